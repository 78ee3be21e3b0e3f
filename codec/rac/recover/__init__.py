"""Recovery: what a quantised model has beside its codes, tuned until it predicts as the original does.

Codes stay as they are. Trained are a gain for each row of a quantised matrix, and the vectors of the model (gains of
norms, biases), against the original's predictions on text (`rac.recover.run`).
"""
