"""From a finished run to the Hub: the model card and the upload."""
