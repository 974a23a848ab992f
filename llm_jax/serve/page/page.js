// The page: a text is typed, tokens come, and each can be looked into or exchanged for another.

import { Refused, events, getJson, setKey } from './api.js';
import * as card from './card.js';
import { choose, chosenIndex } from './inside.js';
import * as tokens from './tokens.js';
import { apply, onLanguage, setLanguage, word } from './words.js';

const find = id => document.getElementById(id);
const NUMBERS = ['temperature', 'top_p', 'top_k', 'min_p', 'repetition_penalty', 'seed', 'max_tokens'];
let about = null, running = null, status = null, hiding = 0;

// --- generating

function sampling() {
  const values = NUMBERS.map(name => [name, find(name).valueAsNumber]);
  return Object.fromEntries(values.filter(([, value]) => !Number.isNaN(value)));
}

// kept: how many tokens of those shown stay; exchanged: what then stands in the place after them.
async function generate(body, kept, exchanged) {
  running?.abort();
  const mine = running = new AbortController();
  unchoose();
  problem(null);
  find('work').hidden = false;
  showRunning(true);
  const started = performance.now();
  let count = 0, end = null, first = 0;
  try {
    for await (const event of events('/api/generate', { ...body, ...sampling() }, mine.signal)) {
      if (mine !== running) return;
      mine.signal.throwIfAborted();  // what has come already may be many tokens
      if (event.prompt) {
        tokens.truncate(kept);
        for (const token of event.prompt.slice(kept)) tokens.append({ ...token, given: kept === 0, ...exchanged });
        if (exchanged) tokens.focus(kept, { preventScroll: true });
        if (kept === 0) score(event.prompt.map(token => token.id), mine.signal);
      }
      for (const token of event.tokens ?? []) {
        first ||= performance.now();
        tokens.append(token);
        count += 1;
      }
      if (event.end) end = event.end;
      const seconds = (performance.now() - first) / 1000;
      showStatus({ count, rate: count > 1 && seconds > 0 ? (count - 1) / seconds : null, end });
    }
  } catch (error) {
    if (mine !== running) return;
    if (mine.signal.aborted) showStatus({ count, rate: null, end: 'stopped' });
    else problem(error);
  }
  running = null;
  showRunning(false);
}

// How probable the given tokens are.
async function score(ids, signal) {
  if (ids.length < 2 || !about?.looks_inside) return;
  const found = await getJson('/api/score', { tokens: ids }, signal).catch(() => null);
  found?.tokens.forEach(({ log, top }, index) => {
    const token = tokens.list[index + 1];
    if (token?.id === ids[index + 1] && token.given) tokens.paint(Object.assign(token, { log, top }));
  });
  if (card.shownFor() >= 0) card.show(card.shownFor(), pickable, close);
  if (chosenIndex() >= 0) fillPanel(chosenIndex());
}

function start() {
  const text = find('prompt').value;
  const asked = find('question').checked && !find('as-question').hidden && text;
  tokens.truncate(0);
  generate(asked ? { question: text } : { text }, 0);
}

const ids = count => tokens.list.slice(0, count).map(token => token.id);

function goOn() {
  const all = tokens.list.length;
  generate({ tokens: ids(all) }, all);
}

function pick(index, { id, piece, log }) {
  const { top } = tokens.list[index];
  card.hide();
  if (id === about.end) {
    running?.abort();
    running = null;
    unchoose();
    tokens.truncate(index);
    tokens.append({ id, piece, bytes: '', log, top });
    showStatus({ count: 0, rate: null, end: 'eos' });
    showRunning(false);
    tokens.focus(index);
    return;
  }
  tokens.truncate(index + 1);
  generate({ tokens: [...ids(index), id] }, index, { log, top });
}

// --- what is shown

function showRunning(on) {
  find('go').dataset.word = on ? 'stop' : 'go';
  find('go').textContent = word(find('go').dataset.word);
  const last = tokens.list.at(-1);
  const full = tokens.list.length >= about?.max_length;
  find('on').hidden = on || full || !about?.looks_inside || !last || last.id === about.end;
  find('tokens').classList.toggle('running', on);
}

function showStatus(now) {
  status = now;
  const { count, rate, end } = now;
  const line = rate ? word('rate')(count, rate.toFixed(0)) : count ? word('running')(count) : '';
  const parts = [line, end && word('ended')[end]].filter(Boolean);
  find('status').textContent = parts.join(document.documentElement.lang === 'en' ? '; ' : '；');
}

function problem(error) {
  const shown = find('problem');
  shown.hidden = error === null;
  if (error === null) return;
  if (error instanceof Refused && error.status === 401) {
    find('key-field').hidden = false;
    shown.textContent = word('needs_key');
  } else {
    shown.textContent = error instanceof Refused ? error.message : word('unreachable');
  }
}

function facts() {
  if (!about) return;
  const short = new Intl.NumberFormat(document.documentElement.lang, { notation: 'compact', maximumFractionDigits: 1 });
  const whole = new Intl.NumberFormat(document.documentElement.lang);
  find('name').textContent = about.name;
  document.title = `${about.name} · llm_jax`;
  find('facts').textContent = word('facts')(
    short.format(about.parameters), whole.format(about.vocabulary), whole.format(about.max_length),
    about.step && whole.format(about.step),
  );
}

function samplingNow() {
  const { temperature, top_p, top_k } = sampling();
  const parts = [`T ${temperature}`, top_p && `p ${top_p}`, top_k && `k ${top_k}`];
  find('sampling-now').textContent = parts.filter(Boolean).join(', ');
}

async function load() {
  try {
    about = await getJson('/api/about');
    problem(null);
  } catch (error) {
    problem(error);
    return;
  }
  if (!about.looks_inside) {
    // An encoder reads the text, so that what follows neither goes on from it nor can be exchanged.
    document.body.classList.add('answers');
    document.querySelector('label[for=prompt]').dataset.word = 'prompt_answered';
    find('how').dataset.word = 'how_answered';
    apply();
  }
  find('as-question').hidden = !about.chats;
  find('question').checked = about.chats;
  find('max_tokens').max = about.max_tokens;
  find('max_tokens').value = Math.min(100, about.max_tokens);
  facts();
}

// --- tokens under pointer and keys

// Where there is a column for it, the chosen token's alternatives stand there and cover no text.
const wide = matchMedia('(min-width: 901px)');

function showCard(index) {
  clearTimeout(hiding);
  if (wide.matches && index === chosenIndex()) card.hide();
  else if (index !== card.shownFor()) card.show(index, pickable, close);
}

function fillPanel(index) {
  find('instead').replaceChildren();
  card.fill(find('instead'), index, pickable);
}

function pickable(index, alternative) {
  if (about.looks_inside) pick(index, alternative);
}

function close() {
  const index = chosenIndex() >= 0 ? chosenIndex() : card.shownFor();
  if (tokens.list[index]) tokens.focus(index, { preventScroll: true });
  unchoose();
}

function unchoose() {
  card.hide();
  if (chosenIndex() >= 0) choose(-1);
}

function select(index) {
  choose(index, about.looks_inside, problem);
  fillPanel(index);
  tokens.focus(index, { preventScroll: true });
  showCard(index);
  if (!wide.matches) card.uncover(index);
}

// The card of the token under the pointer, else of the chosen one.
function leave() {
  clearTimeout(hiding);
  hiding = setTimeout(() => {
    if (card.contains(document.activeElement)) return;
    if (chosenIndex() >= 0) showCard(chosenIndex());
    else card.hide();
  }, 200);
}

find('tokens').addEventListener('pointerover', event => {
  const index = tokens.indexOf(event.target);
  if (event.pointerType === 'mouse' && index >= 0) showCard(index);
});
find('tokens').addEventListener('pointerleave', leave);
find('card').addEventListener('pointerenter', () => clearTimeout(hiding));
find('card').addEventListener('pointerleave', leave);
find('tokens').addEventListener('click', event => {
  const index = tokens.indexOf(event.target);
  if (index >= 0 && getSelection().isCollapsed) select(index);
});
find('tokens').addEventListener('focusin', event => {
  const index = tokens.indexOf(event.target);
  if (index >= 0 && event.target.matches(':focus-visible')) showCard(index);
});
find('tokens').addEventListener('keydown', event => {
  const index = tokens.indexOf(event.target);
  if (index < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
  const last = tokens.list.length - 1;
  const to = {
    ArrowLeft: index - 1, ArrowRight: index + 1, Home: 0, End: last,
    ArrowUp: tokens.across(index, -1), ArrowDown: tokens.across(index, 1),
  }[event.key];
  if (to !== undefined) {
    event.preventDefault();
    tokens.focus(Math.max(0, Math.min(to, last)));
  } else if (event.key === 'Enter' || event.key === ' ') {
    event.preventDefault();
    select(index);
    card.enter(find(wide.matches ? 'instead' : 'card'));
  }
});
addEventListener('keydown', event => {
  if (event.key !== 'Escape') return;
  if (card.shownFor() >= 0 || chosenIndex() >= 0) close();
  else if (running) running.abort();
});
addEventListener('pointerdown', event => {
  const inside = ['tokens', 'card', 'inside'].some(id => find(id).contains(event.target));
  if (!inside) unchoose();
});
for (const id of ['card', 'instead']) find(id).addEventListener('keydown', card.walk);
for (const change of ['resize', 'scroll']) addEventListener(change, card.move, { passive: true });

// --- the form

find('form').addEventListener('submit', event => {
  event.preventDefault();
  if (running) running.abort();
  else start();
});
find('on').addEventListener('click', goOn);
find('prompt').addEventListener('keydown', event => {
  if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    if (find('form').reportValidity()) start();
  }
});
find('sampling').addEventListener('input', samplingNow);
find('sampling').addEventListener('invalid', () => { find('sampling').open = true; }, true); // or it is not seen
find('key').addEventListener('change', event => {
  setKey(event.target.value);
  load();
});
find('key').addEventListener('keydown', event => {
  if (event.key !== 'Enter') return;
  event.preventDefault(); // or the form would be sent
  event.target.blur();
});
find('languages').addEventListener('click', event => {
  if (event.target.value) setLanguage(event.target.value);
});
onLanguage(() => {
  facts();
  tokens.repaint();
  if (status) showStatus(status);
  showRunning(running !== null);
});

apply();
samplingNow();
load();
