"""Clusters beyond a full mesh, as `docs/scale.md` designs them: models in numpy, since nothing of it is built in p2pkv."""
