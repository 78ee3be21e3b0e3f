"""lanes/1: coded tops in interleaved ANS lanes, raw low bits in planes."""
