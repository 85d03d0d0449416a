"""What is offered to the clients."""
