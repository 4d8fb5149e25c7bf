"""A page in the browser on which a model is asked about pictures, and the server of that page. Needs Gradio."""
