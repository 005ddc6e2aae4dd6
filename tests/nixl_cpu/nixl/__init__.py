"""NIXL under the name by which the engines import it. The package of that name only chooses among builds for GPUs."""
