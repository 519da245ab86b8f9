"""The Gradio demo: a Hugging Face Space, and `vlv demo`."""
