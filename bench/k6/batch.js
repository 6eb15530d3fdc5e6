// Batches of new ids at a set rate: each answer has a verdict for each id, in order,
// and an id that a batch has twice is new once.
//
//   k6 run -e RATE=100 -e IDS=1000 bench/k6/batch.js
//
// URL       of the server             http://127.0.0.1:8080
// RATE      batches a second          100
// IDS       in each batch             1000
// KEYS      ids are spread over so many keys: JSON, an object for each id   0: no keys
// TOKENS    1: each id has a token: JSON, too                               0
// DURATION  of the run                30s
// VUS       virtual users to begin with 20
// P95, P99  bounds of the time to answer, ms  50, 100
import { check } from 'k6';
import exec from 'k6/execution';
import http from 'k6/http';
import { Counter, Rate } from 'k6/metrics';
import { setup, steady, unhurried, url } from './accept.js';

const ids = Number(__ENV.IDS || 1000);
const keys = Number(__ENV.KEYS || 0);
const tokens = Number(__ENV.TOKENS || 0) === 1;
const unique = new Counter('verve_ok');
const wrong = new Rate('verve_wrong_answer');

export const options = {
  scenarios: { batch: steady(100, '30s', 20) },
  thresholds: unhurried,
};

export { setup };

// The body of a batch, its type, and how to read the words of the answer.
function render(all) {
  if (keys === 0 && !tokens) {
    return [all.join('\n'), 'text/plain', (answer) => answer.body.split('\n').slice(0, -1)];
  }
  const items = all.map((id, i) => ({
    id,
    ...(keys > 0 && { key: `campaign-${i % ids % keys}` }),
    ...(tokens && { token: `${id}-${i}` }), // the repeat is another attempt
  }));
  return [JSON.stringify(items), 'application/json', (answer) => answer.json('results')];
}

export default function ({ run }) {
  const batch = `${run}${String(exec.scenario.iterationInTest).padStart(8, '0')}`;
  const all = [];
  for (let i = 0; i < ids; i++) {
    all.push(`${batch}${String(i).padStart(5, '0')}`);
  }
  all.push(all[0]); // a repeat
  const [body, type, read] = render(all);
  const answer = http.post(`${url}/api/verve/accept`, body, { headers: { 'Content-Type': type }, tags: { name: 'batch' } });
  if (answer.status !== 200) {
    wrong.add(answer.status !== 0 && answer.status !== 503);
    return; // http_req_failed has it
  }
  const words = read(answer);
  const repeat = words.pop();
  const ok = words.length === ids && repeat === 'duplicate' && words.every((w) => w === 'ok');
  unique.add(words.filter((w) => w === 'ok').length);
  wrong.add(!ok);
  check(answer, { 'a verdict for each id, in order': () => ok });
}
