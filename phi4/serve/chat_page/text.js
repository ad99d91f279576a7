// Shows text as text: whatever a model or a user writes becomes no element, only blocks of code are
// set apart.

const FENCE = /^ {0,3}(`{3,})[ \t]*([^`\n]*)$/;

/**
 * Paragraphs and blocks of code of a text; a block that is not closed yet goes to the end.
 * @returns {{isCode: boolean, language: string, text: string}[]}
 */
function partsOf(text) {
  const parts = [];
  let part = { isCode: false, language: "", lines: [] };
  let fence = "";
  const close = (next) => {
    if (part.isCode || part.lines.some((line) => line.trim())) parts.push(part);
    part = { lines: [], ...next };
  };
  for (const line of text.split("\n")) {
    const found = FENCE.exec(line);
    if (found && !part.isCode) {
      fence = found[1];
      close({ isCode: true, language: found[2].trim() });
    } else if (found && !found[2] && found[1].length >= fence.length) {
      close({ isCode: false, language: "" });
    } else {
      part.lines.push(line);
    }
  }
  close({});
  return parts.map(({ isCode, language, lines }) => {
    const joined = lines.join("\n");
    return { isCode, language, text: isCode ? joined : joined.replace(/^\n+|\n+$/g, "") };
  });
}

/** Make an element show a text; what it shows already stays as it is. */
function show(element, text) {
  const parts = partsOf(text);
  parts.forEach((part, index) => {
    const label = part.isCode ? `code ${part.language}` : "text";
    let shown = element.children[index];
    if (shown?.dataset.label !== label) {
      const made = part.isCode ? codeBlock(part.language) : document.createElement("p");
      made.dataset.label = label;
      if (shown) shown.replaceWith(made);
      else element.append(made);
      shown = made;
    }
    const target = part.isCode ? shown.querySelector("code") : shown;
    if (target.textContent !== part.text) target.textContent = part.text;
  });
  while (element.children.length > parts.length) element.lastElementChild.remove();
}

function codeBlock(language) {
  const block = document.createElement("pre");
  block.tabIndex = 0;
  if (language) {
    const name = document.createElement("span");
    name.className = "language";
    name.textContent = language;
    block.append(name);
  }
  block.append(document.createElement("code"));
  return block;
}
