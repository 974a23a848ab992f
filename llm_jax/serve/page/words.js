// Every word on the page, in English and Chinese.

const WORDS = {
  en: {
    language: 'Language',
    prompt: 'Text to go on from',
    prompt_answered: 'Text that the model answers',
    placeholder: 'Type the beginning of a text, or nothing at all',
    go: 'Generate', stop: 'Stop', on: 'Go on', question: 'as a question in a chat',
    hint: 'Ctrl + Enter', hint_mac: '⌘ + Enter',
    sampling: 'Sampling',
    temperature: 'Temperature', top_p: 'Top-p', top_k: 'Top-k', min_p: 'Min-p',
    repetition_penalty: 'Repetition penalty', seed: 'Seed', max_tokens: 'Most new tokens',
    key: 'API key',
    text: 'Text', tokens: 'Tokens: arrow keys move, Enter shows what could stand there instead',
    inside: 'Inside the model',
    how: 'Point at a token to see what could have stood there; click an alternative and the text goes on ' +
      'from it. Click a token to see where the model looked, and what each layer would have said.',
    how_touch: 'Tap a token to see what could have stood there, where the model looked, and what each ' +
      'layer would have said. Tap an alternative and the text goes on from it.',
    how_answered: 'Point at a token of the answer to see what could have stood there.',
    instead: 'What could stand here instead', close: 'Close',
    attention: 'Attention', views: 'Whose attention', itself: 'of this token', before: 'that chose it',
    heads: 'Heads by layer: arrow keys move',
    all_heads: 'Mean of all heads. Each square is a head, stronger where it looks at one token.',
    output: 'Output',
    lens: 'Layer by layer',
    lens_note: 'What each layer would have said here, and the chance it gave to this token.',
    first_token: 'The first token: nothing chose it.',
    this_token: 'this token', best_guesses: 'best guesses',
    running: count => `${count} new tokens`,
    rate: (count, rate) => `${count} new tokens, ${rate} per second`,
    ended: {
      eos: 'the text ends here', stop: 'the answer ends here', max_tokens: 'as many as were asked for',
      length_limit: 'the model has no more places', stopped: 'stopped',
    },
    facts: (parameters, vocabulary, length, step) =>
      `${parameters} parameters, ${vocabulary} tokens, ${length} places` + (step ? `, step ${step}` : ''),
    needs_key: 'This server needs an API key.',
    unreachable: 'The server cannot be reached.',
    no_chance: 'given',
  },
  zh: {
    language: '语言',
    prompt: '从这段文字续写',
    prompt_answered: '模型要回答的文字',
    placeholder: '输入文字的开头，也可以留空',
    go: '生成', stop: '停止', on: '继续', question: '作为对话中的提问',
    hint: 'Ctrl + Enter', hint_mac: '⌘ + Enter',
    sampling: '采样',
    temperature: '温度', top_p: 'Top-p', top_k: 'Top-k', min_p: 'Min-p',
    repetition_penalty: '重复惩罚', seed: '随机种子', max_tokens: '最多新词元',
    key: 'API 密钥',
    text: '文本', tokens: '词元：方向键移动，回车查看其他可能',
    inside: '模型内部',
    how: '指向一个词元，可以看到此处的其他可能；点击其中一个，文本便从那里续写。点击词元，可以看到模型注意了哪里，' +
      '以及每一层会说什么。',
    how_touch: '点按一个词元，可以看到此处的其他可能、模型注意了哪里，以及每一层会说什么。点按其中一个可能，文本便从那里续写。',
    how_answered: '指向回答中的一个词元，可以看到此处的其他可能。',
    instead: '此处的其他可能', close: '关闭',
    attention: '注意力', views: '谁的注意力', itself: '该词元', before: '选出它时',
    heads: '各层的注意力头：方向键移动',
    all_heads: '所有头的平均。每个方格是一个头，越浓表示越集中于某一个词元。',
    output: '输出',
    lens: '逐层预测',
    lens_note: '每一层在此处会说什么，以及它给这个词元的概率。',
    first_token: '第一个词元：没有什么选出它。',
    this_token: '该词元', best_guesses: '最可能',
    running: count => `${count} 个新词元`,
    rate: (count, rate) => `${count} 个新词元，每秒 ${rate} 个`,
    ended: {
      eos: '文本到此结束', stop: '回答到此结束', max_tokens: '已达到所要求的数量',
      length_limit: '模型没有更多位置', stopped: '已停止',
    },
    facts: (parameters, vocabulary, length, step) =>
      `${parameters} 个参数，${vocabulary} 个词元，${length} 个位置` + (step ? `，第 ${step} 步` : ''),
    needs_key: '此服务器需要 API 密钥。',
    unreachable: '无法连接服务器。',
    no_chance: '给定',
  },
};

let language = (stored() ?? navigator.language).toLowerCase().startsWith('zh') ? 'zh' : 'en';
const mac = /Mac|iPhone|iPad/.test(navigator.platform);
const touch = matchMedia('(hover: none)').matches;
const listeners = [];

export const word = name => WORDS[language][name];
export const currentLanguage = () => language;
export const onLanguage = listener => listeners.push(listener);

export function setLanguage(name) {
  language = name;
  try { localStorage.setItem('language', name); } catch { /* private browsing: for this visit only */ }
  apply();
  for (const listener of listeners) listener();
}

export function apply() {
  document.documentElement.lang = language === 'zh' ? 'zh-CN' : 'en';
  for (const node of document.querySelectorAll('[data-word]')) {
    const name = node.dataset.word;
    node.textContent = word(name === 'hint' && mac ? 'hint_mac' : name === 'how' && touch ? 'how_touch' : name);
  }
  for (const node of document.querySelectorAll('[data-label]')) {
    node.setAttribute('aria-label', word(node.dataset.label));
  }
  document.getElementById('prompt').placeholder = word('placeholder');
  for (const button of document.querySelectorAll('#languages button')) {
    button.setAttribute('aria-pressed', button.value === language);
  }
}

// 0.37 as "37%", and what is too small to tell apart as "<0.01%".
export function percent(probability) {
  const value = 100 * probability;
  if (value < 0.01) return '<0.01%';
  return (value >= 9.95 ? value.toFixed(0) : value >= 0.995 ? value.toFixed(1) : value.toFixed(2)) + '%';
}

export const layerName = (layer, layers) =>
  layer === layers - 1 ? word('output') : language === 'zh' ? `第 ${layer + 1} 层` : `Layer ${layer + 1}`;

export const headName = (layer, head) =>
  language === 'zh' ? `第 ${layer + 1} 层，第 ${head + 1} 头` : `Layer ${layer + 1}, head ${head + 1}`;

function stored() {
  try { return localStorage.getItem('language'); } catch { return null; }
}
