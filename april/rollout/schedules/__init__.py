"""When work runs and when a batch is cut; each schedule is one rule over the view."""
