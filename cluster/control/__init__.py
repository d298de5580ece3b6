"""Changes of the fleet as transactions, healing, links made anew, liveness. Knows a fleet by its protocol only."""
