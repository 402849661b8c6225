"""What models read while they are measured: texts and generated tasks."""
