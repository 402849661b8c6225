"""To the Hugging Face Hub and back: export, verification, import, push."""
