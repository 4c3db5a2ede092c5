"""Write the HTML report of a pruned model (``slimgpt report``)."""
