"""Messages over HTTPS with certificates on both sides: no other software than Python."""
