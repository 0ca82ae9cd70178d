"""Everything that touches files: real images, pipelines, the synthetic set, its soft labels."""
