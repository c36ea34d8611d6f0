// The playground: sends a form to /v1/generate and draws each token as it arrives, coloured by who proposed it.
// Knows nothing but that route and /readyz. Everything shown is set as text, never as markup.

const $ = (id) => document.getElementById(id);
const files = [];
let running = null; // AbortController of the answer being streamed
let numRuns = 0;

// -- media

const addFiles = (list) => {
  for (const file of list) if (/^(image|video)\//.test(file.type)) files.push(file);
  drawPreviews();
};

function drawPreviews() {
  for (const shown of $("previews").querySelectorAll("img, video")) URL.revokeObjectURL(shown.src);
  $("previews").replaceChildren(...files.map((file, index) => {
    const figure = document.createElement("figure");
    const isVideo = file.type.startsWith("video/");
    const shown = document.createElement(isVideo ? "video" : "img");
    shown.src = URL.createObjectURL(file);
    if (isVideo) Object.assign(shown, { muted: true, loop: true, autoplay: true, playsInline: true });
    const remove = Object.assign(document.createElement("button"), { type: "button", textContent: "×", title: "remove" });
    remove.addEventListener("click", (event) => {
      event.stopPropagation();
      files.splice(index, 1);
      drawPreviews();
    });
    figure.append(shown, remove);
    return figure;
  }));
}

const drop = $("drop");
drop.addEventListener("click", () => $("files").click());
drop.addEventListener("keydown", (event) => {
  if (event.target === drop && (event.key === "Enter" || event.key === " ")) { event.preventDefault(); $("files").click(); }
});
$("files").addEventListener("click", (event) => event.stopPropagation());
$("files").addEventListener("change", () => { addFiles($("files").files); $("files").value = ""; });
for (const kind of ["dragover", "dragleave", "drop"]) {
  drop.addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", kind === "dragover");
    if (kind === "drop") addFiles(event.dataTransfer.files);
  });
}
document.addEventListener("paste", (event) => addFiles(event.clipboardData.files));

// -- one answer

function readForm() {
  const form = new FormData();
  for (const file of files) form.append("media", file, file.name || "pasted");
  form.append("prompt", $("prompt").value);
  for (const name of ["max_tokens", "temperature", "seed"]) if ($(name).value !== "") form.append(name, $(name).value);
  const hasVideo = files.some((file) => file.type.startsWith("video/"));
  if (hasVideo && $("num_frames").value !== "") form.append("num_frames", $("num_frames").value);
  form.append("speculation", $("speculation").checked ? "auto" : "off");
  form.append("stream", "true");
  return form;
}

/** The JSON values of a stream of server-sent events; comments, which keep the connection open, are passed over. */
async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      if (block.startsWith(":")) continue;
      const data = block.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function drawTokens(event) {
  const known = event.tokens.map((token) => token.text).join("");
  const parts = known === event.text ? event.tokens : [{ text: event.text, source: event.tokens.at(-1)?.source ?? "target" }];
  for (const { text, source } of parts) {
    if (text === "") continue;
    const span = document.createElement("span");
    span.className = source;
    span.textContent = text;
    $("answer").append(span);
  }
}

const percent = (part, whole) => (whole ? `${Math.round((100 * part) / whole)} %` : "–");

async function generate() {
  running = new AbortController();
  const spoken = { tokens: 0, drafted: 0, firstAt: 0, first: 0 };
  const started = performance.now();
  const key = $("key").value;
  const response = await fetch("/v1/generate", {
    method: "POST", body: readForm(), signal: running.signal, headers: key ? { Authorization: `Bearer ${key}` } : {},
  });
  if (!response.ok) throw new Error((await response.json()).error.message);
  for await (const event of readEvents(response.body)) {
    if (event.error) throw new Error(event.error.message);
    if (event.type === "done") return showDone(event);
    drawTokens(event);
    const now = performance.now();
    if (!spoken.firstAt) { spoken.firstAt = now; spoken.first = event.tokens.length; }
    spoken.tokens += event.tokens.length;
    spoken.drafted += event.tokens.filter((token) => token.source === "draft").length;
    if (now > spoken.firstAt) $("speed").textContent = (1000 * (spoken.tokens - spoken.first) / (now - spoken.firstAt)).toFixed(0);
    $("share").textContent = percent(spoken.drafted, spoken.tokens);
    $("ttft").textContent = `${((spoken.firstAt - started) / 1000).toFixed(2)} s`;
  }
}

function showDone({ usage, speculation, timings }) {
  const speed = timings.tokens_per_second.toFixed(0);
  const length = speculation.drafts ? speculation.acceptance_length.toFixed(2) : "–";
  $("speed").textContent = speed;
  $("acceptance").textContent = length;
  $("ttft").textContent = `${timings.time_to_first_token.toFixed(2)} s`;
  numRuns += 1;
  const row = document.createElement("tr");
  const mode = $("speculation").checked ? "on" : "off";
  for (const text of [numRuns, mode, usage.completion_tokens, speed, length, `${timings.decode.toFixed(2)} s`]) {
    row.append(Object.assign(document.createElement("td"), { textContent: text }));
  }
  $("runs").hidden = false;
  $("runs").tBodies[0].prepend(row);
}

$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (running) return;
  $("answer").replaceChildren();
  for (const id of ["speed", "acceptance", "share", "ttft"]) $(id).textContent = "–";
  $("go").disabled = true;
  $("stop").hidden = false;
  try {
    await generate();
  } catch (error) {
    const line = document.createElement("div");
    line.className = error.name === "AbortError" ? "hint" : "error";
    line.textContent = error.name === "AbortError" ? "(stopped)" : error.message;
    $("answer").append(line);
  } finally {
    running = null;
    $("go").disabled = false;
    $("stop").hidden = true;
  }
});
$("stop").addEventListener("click", () => running?.abort());
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});

// -- whether the server is ready

async function showStatus() {
  let [text, kind] = ["not reachable", "bad"];
  try {
    const response = await fetch("/readyz");
    const { status } = await response.json();
    [text, kind] = [status, response.ok ? "good" : "bad"];
  } catch { /* the server is away: say so */ }
  $("status").textContent = text;
  $("status").className = `pill ${kind}`;
}
showStatus();
setInterval(showStatus, 3000);
