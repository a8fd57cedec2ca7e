"""Messages over NVFlare: its jobs carry them and hold nothing of the study."""
