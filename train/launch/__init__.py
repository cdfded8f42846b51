"""Examples of how to start a run on a cluster, to copy and change: ``python -m fastmae.train.launch`` lists them."""
