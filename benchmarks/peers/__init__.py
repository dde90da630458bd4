"""The operations of other packages, called as their documentation says, on the suites' tensors."""
