"""A page to play with: what can be set, drawings in pieces, canvases (all without gradio), and the page itself."""
