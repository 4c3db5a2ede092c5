"""Recovery methods: which weights are trained, by which loss, and how they are merged."""
