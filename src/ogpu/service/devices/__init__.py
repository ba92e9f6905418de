"""The GPUs: which are here, which slot sees which, how full their memory is. In the front."""
