"""Where other tools meet this package: each module here is for one of them and imports it, so nothing else imports
these modules. ``mergekit`` registers a merge method, ``transformers`` loads a merge into a model."""
