"""Train tasks; exactly one, because OHIF starts all of them."""
