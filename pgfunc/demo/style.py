"""What the page adds to Gradio's default theme, whose fonts are served from this machine."""

CSS = """
:root { --button-primary-background-fill: #c2410c; --button-primary-background-fill-hover: #9a3412;
  --block-info-text-color: #52525b }  /* enough contrast for small letters */
:root .dark { --button-primary-background-fill: #c2410c; --button-primary-background-fill-hover: #9a3412;
  --block-info-text-color: #d4d4d8 }
:is(#picture, #drawing) img { width: 100%; height: 100%; object-fit: contain }
#legend table { border-collapse: collapse; width: 100%; margin: 0 }
#legend :is(table, thead, tbody, tr) { border: 0 }
#legend :is(th, td) { border: 0; border-bottom: 1px solid var(--border-color-primary); text-align: left; padding: 4px }
.swatch { display: inline-block; width: 1em; height: 1em; border: 1px solid currentColor; vertical-align: middle }
#status [role=alert] { color: #b91c1c; font-weight: 600; margin: 0; overflow-wrap: anywhere }
.dark #status [role=alert] { color: #fca5a5 }
"""

# Gradio puts a picture that it shows into a button, which has no name for screen readers
NAME_PICTURES = """() => {
    const names = {drawing: "Drawing of the objects in the table", attention: "Map of the attention"};
    for (const [id, name] of Object.entries(names))
        for (const button of document.querySelectorAll(`#${id} button:not([aria-label])`))
            button.setAttribute("aria-label", name);
}"""
