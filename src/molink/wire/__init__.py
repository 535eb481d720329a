"""What crosses: the codec, frames and messages."""
