"""The engine and its front door in one process, without Ray: what `Client.local` is connected to."""
