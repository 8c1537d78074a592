"""RO-Crates: what ran, on what, with which result, in the entities that archives and workflow registries read."""
