"""What a width costs in milliseconds: a few small models are measured on the runtime, any other is predicted."""
