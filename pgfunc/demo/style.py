"""How the page looks beyond Gradio's default theme, whose fonts are served from this machine."""

CSS = """
:is(#picture, #drawing) img { width: 100%; height: 100%; object-fit: contain }
#legend table { border-collapse: collapse; width: 100%; margin: 0 }
#legend :is(table, thead, tbody, tr) { border: 0 }
#legend :is(th, td) { border: 0; border-bottom: 1px solid var(--border-color-primary); text-align: left; padding: 4px }
.swatch { display: inline-block; width: 1em; height: 1em; border: 1px solid currentColor; vertical-align: middle }
#status [role=alert] { color: #b91c1c; font-weight: 600; margin: 0 }
.dark #status [role=alert] { color: #fca5a5 }
"""
