"""What bases do to the weights of a model (`rac analyze`): a map of plain numbers, a page and a picture of it."""
