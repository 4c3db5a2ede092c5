"""The files of a pruned model: weights, config, modelling code, report, model card."""
