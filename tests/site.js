/* The search on the pages of `make site`. "/" goes to the field, the arrows and Enter to a result.
   The index (search-index.js) is loaded when the field is used first. */
(() => {
  const box = document.querySelector("#search");
  const field = box.querySelector("input"), list = box.querySelector("ol");
  const top = document.documentElement.dataset.top;
  box.hidden = false;

  let loading = null;
  const load = () => loading ??= new Promise(done => {
    const script = document.createElement("script");
    script.src = `${top}search-index.js`;
    script.onload = done;
    document.head.append(script);
  });

  // points for a word in a text: the text itself, the start of a word in it, inside of a word
  const points = (text, word, equal, start, inside) => {
    if (text === word) return equal;
    let best = 0;
    for (let at = text.indexOf(word); at >= 0 && best < start; at = text.indexOf(word, at + 1)) {
      best = at && /[a-z0-9]/.test(text[at - 1]) ? inside : start;
    }
    return best;
  };

  // the sum over the words, or 0 if a word is not found
  const total = (words, score) => {
    const found = words.map(score);
    return found.includes(0) ? 0 : found.reduce((a, b) => a + b, 0);
  };

  // titles, headings and exported names first, then text
  const search = query => {
    const words = query.toLowerCase().split(/\s+/).filter(Boolean), found = [];
    if (!words.length) return found;
    for (const [number, anchor, heading, names, prose, code] of SEARCH.sections) {
      const [page, title, part, module] = SEARCH.pages[number];
      const first = heading === title, lower = heading.toLowerCase();
      for (const name of names) {
        const last = name.toLowerCase().split(".").pop();
        const score = total(words, w => points(last, w, 100, 60, 30) || points(name.toLowerCase(), w, 50, 25, 12));
        if (score) found.push({score, page, part, title, heading, name, anchor: `${module}.${name}`});
      }
      const score = total(words, w =>
        points(lower, w, 90, 60, 30) * (first ? 1.3 : 1) || points(prose.toLowerCase(), w, 10, 10, 5)
        || points(code.toLowerCase(), w, 6, 6, 3) || points(title.toLowerCase(), w, 3, 3, 2));
      if (score) found.push({score, page, part, title, heading, anchor: first ? "" : anchor, prose, words});
    }
    return found.sort((a, b) => b.score - a.score).slice(0, 24);
  };

  const add = (parent, tag, text, name) => {
    const node = parent.appendChild(document.createElement(tag));
    node.textContent = text;
    if (name) node.className = name;
    return node;
  };

  // some text around the first word that is in it
  const snippet = (parent, prose, words) => {
    const lower = prose.toLowerCase(), word = words.find(w => lower.includes(w));
    if (!word) return;
    const at = lower.indexOf(word), start = at < 50 ? 0 : prose.indexOf(" ", at - 50) + 1;
    const line = add(parent, "small", (start ? "… " : "") + prose.slice(start, at));
    add(line, "mark", prose.slice(at, at + word.length));
    line.append(prose.slice(at + word.length, at + 90) + (at + 90 < prose.length ? " …" : ""));
  };

  const show = async () => {
    await load();
    list.replaceChildren();
    const query = field.value.trim();
    for (const {page, part, title, heading, name, anchor, prose, words} of search(query)) {
      const link = add(add(list, "li", ""), "a", "");
      link.href = top + page + (anchor ? `#${anchor}` : "");
      add(link, name ? "code" : "b", name || heading);
      const first = heading === title;
      const path = [part, name || !first ? title : "", name && !first ? heading : ""];
      add(link, "span", path.filter(Boolean).join(" › "));
      if (prose) snippet(link, prose, words);
    }
    if (query && !list.children.length) add(list, "li", "nothing found", "none");
    list.hidden = !query;
  };

  const close = () => { list.hidden = true; field.blur(); };
  field.addEventListener("focus", () => { load(); if (field.value) show(); });
  field.addEventListener("input", show);
  box.addEventListener("submit", async e => {
    e.preventDefault();
    await show();
    list.querySelector("a")?.click();
  });
  document.addEventListener("click", e => { if (!box.contains(e.target) || e.target.closest("a")) list.hidden = true; });
  document.addEventListener("keydown", e => {
    const typing = e.target.closest("input, textarea, select, [contenteditable]");
    if (e.key === "/" && !typing && !e.ctrlKey && !e.metaKey && !e.altKey) {
      e.preventDefault();
      field.focus();
      field.select();
    } else if (e.key === "Escape" && box.contains(e.target)) {
      close();
    } else if ((e.key === "ArrowDown" || e.key === "ArrowUp") && box.contains(e.target)) {
      e.preventDefault();
      const stops = [field, ...list.querySelectorAll("a")];
      const at = stops.indexOf(document.activeElement) + (e.key === "ArrowDown" ? 1 : -1);
      stops[Math.max(0, Math.min(stops.length - 1, at))].focus();
    }
  });

  // the current chapter in the middle of the list of chapters
  const chapters = document.querySelector("#chapters"), here = chapters.querySelector("[aria-current]");
  if (here) chapters.scrollTop = here.offsetTop - chapters.clientHeight / 2;
})();
