"""Puts a cluster together on Ray: controller, fleet, ingress, `isotherm serve`, KubeRay's entry."""
