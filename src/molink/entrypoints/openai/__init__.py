"""Where earlier versions had their OpenAI-compatible server."""
