"""OpenAI's files and batches: stored in a folder, run on this server behind what people wait for."""
