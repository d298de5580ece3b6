"""What keeps a machine or a cluster from serving, found before it does: facts are gathered and judged apart."""
