// The responses: a sorted, filtered, paged list, and the inspector of a token.
"use strict";

(async () => {
  const { element, byId, percent, number } = Report;
  const packed = byId("trace-data").textContent;
  if (!packed || !byId("trace-list")) return;
  const list = byId("trace-list");
  if (typeof DecompressionStream === "undefined") {
    const text = "This browser cannot unpack the responses (it lacks DecompressionStream). Chromium 92, Firefox 113 or Safari 16.4 and newer can.";
    list.append(element("p", { className: "note" }, text));
    return;
  }
  list.append(element("p", { className: "quiet" }, "Unpacking the responses ..."));
  const { header, column } = await Report.unpack(packed);
  byId("trace-data").remove(); // megabytes of text that nobody needs any more

  const TOP = 5;
  const NONE = 65535;
  const PAGE = 20;
  const FOLD = 500; // tokens of a response that are shown before one asks for all
  const SOURCES = [
    ["s", "accepted", "the student's proposal, kept"],
    ["t", "replaced", "the teacher's, in place of a rejected proposal"],
    ["u", "undrafted", "the teacher's; no student proposed"],
    ["r", "reference", "of a given text"],
    ["a", "resampled", "drawn from the student again, inside what the gate keeps"],
    ["f", "flagged", "rejected by the gate, but left in the text"],
    ["h", "handed", "the teacher's, in a leg that a rejection began"],
  ];
  const LEVELS = {
    kl: [0.01, 0.05, 0.2, 0.5, 1.5],
    student: [0.105, 0.51, 1.2, 2.3, 4.6], // -ln q, which is q = 90, 60, 30, 10 and 1 %
  };
  const LEVEL_NAMES = {
    kl: ["below 0.01 nats", "from 0.01", "from 0.05", "from 0.2", "from 0.5", "from 1.5"],
    student: ["q above 90 %", "from 60 %", "from 30 %", "from 10 %", "from 1 %", "below 1 %"],
  };
  const token = Object.fromEntries(
    ["token", "source", "rejected", "rank", "student", "teacher", "kl", "entropy", "topToken", "topLogp"].map((name) => [name, column(name)]),
  );
  const trace = Object.fromEntries(
    ["run", "step", "length", "meanKl", "maxKl", "replaced", "cutOff", "prompt", "response", "teacherPrompt", "teacherName"].map((name) => [name, column(`trace.${name}`)]),
  );
  const count = trace.length.length;
  const starts = new Uint32Array(count + 1);
  for (let i = 0; i < count; i++) starts[i + 1] = starts[i] + trace.length[i];
  const runNames = JSON.parse(byId("curve-data").textContent).runs.map((run) => run.name);
  const special = new Set(header.special);
  const lowered = header.strings.map((text) => text.toLowerCase());
  const state = { page: 0, falling: true, order: [], words: "" };

  // A piece as text; the bytes of a part of a character are shown as what they are.
  const pieceText = (place) => {
    const piece = header.pieces[place - 1][1];
    return typeof piece === "string" ? piece : piece.map((byte) => `⟨${byte.toString(16).toUpperCase().padStart(2, "0")}⟩`).join("");
  };
  const visible = (place) =>
    place === 0 ? "-" : pieceText(place).replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll("\r", "␍") || "(empty)";
  const share = (stored) => (stored === NONE ? "-" : percent(Math.exp(-stored / 1000)));
  const nats = (stored) => (stored === NONE ? "-" : `${number(stored / 1000)} nats`);

  // ---- which responses, in which order

  function choose() {
    const run = Number(byId("trace-run")?.value ?? -1);
    const from = byId("step-from").value === "" ? -Infinity : Number(byId("step-from").value);
    const to = byId("step-to").value === "" ? Infinity : Number(byId("step-to").value);
    state.words = byId("search").value.toLowerCase();
    const hits = state.words ? new Uint8Array(lowered.map((text) => text.includes(state.words))) : null;
    const found = [];
    for (let i = 0; i < count; i++) {
      if (run >= 0 && trace.run[i] !== run) continue;
      if (trace.step[i] < from || trace.step[i] > to) continue;
      if (hits && !hits[trace.prompt[i]] && !hits[trace.response[i]] && !hits[trace.teacherPrompt[i]]) continue;
      found.push(i);
    }
    const key = trace[byId("sort").value];
    const sign = state.falling ? -1 : 1;
    state.order = found.sort((a, b) => sign * (key[a] - key[b]) || a - b);
    state.page = 0;
    show();
  }

  function show() {
    inspector.close();
    const pages = Math.max(1, Math.ceil(state.order.length / PAGE));
    const rows = state.order.slice(state.page * PAGE, (state.page + 1) * PAGE);
    list.replaceChildren(...rows.map(card));
    if (!rows.length) list.append(element("p", { className: "empty" }, "No response matches."));
    const first = state.page * PAGE + 1;
    const range = rows.length ? `${first} to ${first + rows.length - 1} of ` : "";
    document.querySelectorAll(".pager").forEach((pager) => {
      pager.querySelector(".place").textContent = `${range}${state.order.length.toLocaleString("en")} responses`;
      pager.querySelector(".previous").disabled = state.page === 0;
      pager.querySelector(".next").disabled = state.page >= pages - 1;
    });
  }

  // ---- one response

  function card(index) {
    const teacher = header.strings[trace.teacherName[index]];
    const facts = [
      runNames.length > 1 ? element("span", {}, element("span", { className: `swatch run${trace.run[index] % 6}` }), runNames[trace.run[index]]) : "",
      `step ${trace.step[index]}`,
      teacher ? `teacher ${teacher}` : "",
      `${trace.length[index]} tokens`,
      `mean KL ${number(trace.meanKl[index])}`,
      `${percent(trace.replaced[index])} replaced`,
      trace.cutOff[index] ? "cut off at the limit" : "",
    ].filter(Boolean);
    const prompt = element("p", { className: "prompt" });
    mark(prompt, header.strings[trace.prompt[index]]);
    const teachers = element("p", { className: "prompt" });
    const own = header.strings[trace.teacherPrompt[index]];
    if (own) {
      teachers.append(element("b", {}, "The teacher reads: "));
      apart(header.strings[trace.prompt[index]], own).forEach(([text, shared]) => {
        const part = element("span", { className: shared ? "" : "own" });
        mark(part, text);
        teachers.append(part);
      });
    }
    const response = element("div", {
      className: "tokens",
      role: "listbox",
      tabIndex: 0,
      "aria-orientation": "horizontal",
      "aria-label": `Response: ${header.strings[trace.response[index]]}`,
    });
    response.dataset.trace = index;
    fill(response, index, Math.min(trace.length[index], FOLD));
    const made = element("article", { className: "card trace" }, element("p", { className: "facts" }), prompt, ...(own ? [teachers] : []), response);
    facts.forEach((fact) => made.firstChild.append(element("span", {}, fact)));
    if (trace.length[index] > FOLD) {
      const all = element("button", { type: "button" }, `Show all ${trace.length[index].toLocaleString("en")} tokens`);
      all.addEventListener("click", () => {
        fill(response, index, trace.length[index]);
        all.remove();
      });
      made.append(all);
    }
    return made;
  }

  // The teacher's prompt in parts: [text, whether the student reads it, too]. A chat's end is the same in both; before it
  // the student's prompt may stand as a whole.
  function apart(students, teachers) {
    let same = 0;
    while (same < Math.min(students.length, teachers.length) && students.at(-1 - same) === teachers.at(-1 - same)) same++;
    const [mine, theirs] = [students, teachers].map((text) => text.slice(0, text.length - same));
    const at = mine ? theirs.indexOf(mine) : 0;
    const parts = at < 0 ? [[theirs, false]] : [[theirs.slice(0, at), false], [mine, true], [theirs.slice(at + mine.length), false]];
    return [...parts, [teachers.slice(teachers.length - same), true]].filter(([text]) => text);
  }

  function mark(parent, text) {
    let rest = 0;
    const lower = text.toLowerCase();
    const sameLength = lower.length === text.length; // else places in one are not places in the other
    for (let at; state.words && sameLength && (at = lower.indexOf(state.words, rest)) >= 0; rest = at + state.words.length)
      parent.append(text.slice(rest, at), element("mark", {}, text.slice(at, at + state.words.length)));
    parent.append(text.slice(rest));
  }

  function fill(response, index, shown) {
    const start = starts[index];
    const texts = Array.from({ length: shown }, (_, i) => pieceText(token.token[start + i]));
    const found = matched(texts);
    const parts = document.createDocumentFragment();
    texts.forEach((text, i) => {
      const at = start + i;
      const was = token.rejected[at];
      if (was && was !== token.token[at]) parts.append(element("del", { "aria-hidden": "true" }, visible(was)));
      const span = element("span", { className: `token ${look(at)}${found[i] ? " found" : ""}`, role: "option", id: `token-${at}` });
      span.dataset.at = at;
      if (special.has(token.token[at])) span.classList.add("special");
      if (text.includes("\n")) span.append(element("i", { className: "newline", "aria-hidden": "true" }, "↵".repeat(text.split("\n").length - 1)), text);
      else span.append(text || "∅");
      parts.append(span);
    });
    response.replaceChildren(parts);
  }

  // Which of the pieces hold a part of a match of the search.
  function matched(texts) {
    const found = new Uint8Array(texts.length);
    if (!state.words) return found;
    const whole = texts.map((text) => text.toLowerCase());
    const joined = whole.join("");
    for (let at = joined.indexOf(state.words); at >= 0; at = joined.indexOf(state.words, at + 1)) {
      let place = 0;
      whole.forEach((text, i) => {
        if (place < at + state.words.length && place + text.length > at) found[i] = 1;
        place += text.length;
      });
    }
    return found;
  }

  function look(at) {
    const mode = byId("colour").value;
    if (mode === "source") return `source-${SOURCES[token.source[at]][0]}`;
    const stored = token[mode][at];
    if (stored === NONE) return "level-none";
    return `level-${LEVELS[mode].filter((limit) => stored / 1000 >= limit).length}`;
  }

  function legend() {
    const mode = byId("colour").value;
    const present = new Set(token.source);
    const entries =
      mode === "source"
        ? SOURCES.flatMap(([letter, name, about], code) => (present.has(code) ? [[`source-${letter}`, `${name}: ${about}`]] : []))
        : LEVEL_NAMES[mode].map((name, level) => [`level-${level}`, name]);
    const items = entries.map(([kind, text]) => element("span", {}, element("span", { className: `token ${kind}` }, "abc"), " ", text));
    if (byId("show-rejected").checked) items.push(element("span", {}, element("del", {}, "abc"), " rejected proposal"));
    byId("token-legend").replaceChildren(...items);
  }

  // ---- what both models thought of a token

  const inspector = (() => {
    const box = byId("inspector");
    let current = null;
    let pinned = false;

    const row = (name, value) => [element("dt", {}, name), element("dd", {}, value)];
    const bar = (stored) => {
      const filled = element("span", { className: "filled" });
      filled.style.width = `${stored === NONE ? 0 : 100 * Math.exp(-stored / 1000)}%`;
      return element("span", { className: "meter", "aria-hidden": "true" }, filled);
    };

    function proposal(at) {
      const rank = token.rank[at];
      if (rank === 0) return "none";
      const was = token.rejected[at];
      const what = was ? element("span", {}, element("del", {}, visible(was)), " rejected") : "kept";
      return element("span", {}, what, `, the teacher's no. ${rank.toLocaleString("en")}`);
    }

    function entries(at) {
      const rows = [];
      let rest = 1;
      for (let k = 0; k < TOP; k++) {
        const place = token.topToken[TOP * at + k];
        const stored = token.topLogp[TOP * at + k];
        if (!place) break;
        rest -= stored === NONE ? 0 : Math.exp(-stored / 1000);
        const kind = place === token.token[at] ? "chosen" : place === token.rejected[at] ? "refused" : "";
        rows.push(element("tr", { className: kind }, element("th", { scope: "row" }, visible(place)), element("td", {}, bar(stored)), element("td", {}, share(stored))));
      }
      rows.push(element("tr", { className: "quiet" }, element("th", { scope: "row" }, "all others"), element("td"), element("td", {}, percent(Math.max(0, rest)))));
      return element("table", {}, element("caption", {}, "Teacher's first choices"), element("tbody", {}, ...rows));
    }

    function describe(span) {
      const at = Number(span.dataset.at);
      const [letter, name, about] = SOURCES[token.source[at]];
      const index = Number(span.parentElement.dataset.trace);
      box.replaceChildren(
        element("p", { className: "what" }, element("b", { className: `token source-${letter}` }, visible(token.token[at])), ` ${name}: ${about}`),
        element(
          "dl",
          {},
          ...row("Teacher p", element("span", {}, bar(token.teacher[at]), share(token.teacher[at]))),
          ...row("Student q", element("span", {}, bar(token.student[at]), share(token.student[at]))),
          ...row("Proposal", proposal(at)),
          ...row("KL(p‖q)", nats(token.kl[at])),
          ...row("Student entropy", nats(token.entropy[at])),
        ),
        entries(at),
        element("p", { className: "quiet" }, `token ${at - starts[index] + 1} of ${trace.length[index]}, id ${header.pieces[token.token[at] - 1][0]}`, element("span", { className: "narrow" }, "; tap here to close")),
      );
    }

    function place(span) {
      box.style.left = box.style.top = "";
      if (innerWidth < 600) {
        const hiddenBy = span.getBoundingClientRect().bottom + 12 - box.getBoundingClientRect().top; // a sheet at the bottom
        if (hiddenBy > 0) scrollBy({ top: hiddenBy, behavior: "instant" });
        return;
      }
      const first = span.getClientRects()[0];
      const { width, height } = box.getBoundingClientRect();
      const fit = (wanted, size, room) => Math.max(8, Math.min(wanted, room - size - 8));
      let left = first.left;
      let top = first.bottom + 8;
      if (top + height > innerHeight) top = first.top - height - 8;
      if (top < 8) {
        // neither below nor above: beside it
        top = first.bottom;
        left = first.right + 12 + width < innerWidth ? first.right + 12 : first.left - width - 12;
      }
      box.style.left = `${fit(left, width, innerWidth)}px`;
      box.style.top = `${fit(top, height, innerHeight)}px`;
    }

    function open(span, pin) {
      if (pinned && !pin) return;
      if (current !== span) {
        leave();
        current = span;
        span.classList.add("current");
        span.setAttribute("aria-selected", "true");
        span.parentElement.setAttribute("aria-activedescendant", span.id);
        describe(span);
      }
      box.hidden = false;
      place(span);
      pinned = pin || pinned;
    }

    function leave() {
      current?.classList.remove("current");
      current?.removeAttribute("aria-selected");
      current?.parentElement?.removeAttribute("aria-activedescendant");
      current = null;
    }

    function close() {
      leave();
      pinned = false;
      box.hidden = true;
    }

    // After scrolling: one that was opened on purpose stays at its token, as long as that is to be seen or walked from.
    function follow() {
      if (!current) return;
      const { top, bottom } = current.getBoundingClientRect();
      const walking = document.activeElement === current.parentElement;
      if (pinned && (walking || (bottom > 0 && top < innerHeight))) place(current);
      else close();
    }

    return { open, close, follow, current: () => current, pinned: () => pinned };
  })();

  // ---- events

  const tokenOf = (event) => event.target.closest?.(".tokens > .token");
  list.addEventListener("pointerover", (event) => {
    if (event.pointerType !== "mouse" || inspector.pinned()) return;
    const span = tokenOf(event);
    span ? inspector.open(span, false) : inspector.close();
  });
  list.addEventListener("pointerleave", () => inspector.pinned() || inspector.close());
  document.addEventListener("click", (event) => {
    const span = tokenOf(event);
    if (span) span === inspector.current() && inspector.pinned() ? inspector.close() : inspector.open(span, true);
    else inspector.close();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") inspector.close();
  });
  list.addEventListener("keydown", (event) => {
    if (!event.target.classList.contains("tokens")) return;
    const spans = [...event.target.querySelectorAll(".token")];
    const at = spans.indexOf(inspector.current());
    const next = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: spans.length - 1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    const span = spans[Math.max(0, Math.min(next, spans.length - 1))];
    span.scrollIntoView({ block: "nearest", behavior: "instant" });
    inspector.open(span, true);
  });
  list.addEventListener("focusout", () => inspector.close());
  addEventListener("scroll", () => innerWidth >= 600 && inspector.follow(), { passive: true });

  let waiting;
  byId("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(choose, 120);
  });
  ["sort", "step-from", "step-to", "trace-run"].forEach((id) => byId(id)?.addEventListener("change", choose));
  byId("direction").addEventListener("click", (event) => {
    state.falling = !state.falling;
    const word = state.falling ? "falling" : "rising";
    event.target.textContent = `${state.falling ? "↓" : "↑"} ${word}`;
    event.target.setAttribute("aria-label", `Sort direction: ${word}`);
    choose();
  });
  byId("colour").addEventListener("change", () => {
    legend();
    show();
  });
  byId("show-rejected").addEventListener("change", (event) => {
    list.classList.toggle("without-rejected", !event.target.checked);
    legend();
  });
  document.querySelectorAll(".pager").forEach((pager) => {
    pager.querySelector(".previous").addEventListener("click", () => turn(-1));
    pager.querySelector(".next").addEventListener("click", () => turn(1));
  });
  function turn(by) {
    state.page += by;
    show();
    byId("token-legend").scrollIntoView({ block: "start" });
  }

  const steps = trace.step.reduce(([low, high], step) => [Math.min(low, step), Math.max(high, step)], [Infinity, -Infinity]);
  byId("step-from").placeholder = steps[0];
  byId("step-to").placeholder = steps[1];
  legend();
  choose();
})();
