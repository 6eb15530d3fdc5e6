// Retries with a token: the client takes a share of the replies as lost and asks again
// with the same id and token, until it has an answer. Every id is then ok once, whether
// the first request was counted or not.
//
//   k6 run -e LOSE=0.1 bench/k6/retry.js
//
// URL       of the server             http://127.0.0.1:8080
// LOSE      share of the replies that are lost   0.1
// RATE      new ids a second          100
// DURATION  of the run                30s
// VUS       virtual users to begin with 20
import { check } from 'k6';
import exec from 'k6/execution';
import http from 'k6/http';
import { Counter } from 'k6/metrics';
import { setup, steady, url } from './accept.js';

const lose = Number(__ENV.LOSE || 0.1);
const unique = new Counter('verve_ok');
const replayed = new Counter('verve_replayed');

export const options = {
  scenarios: { retry: steady(100, '30s', 20) },
  thresholds: { checks: ['rate==1'] },
};

export { setup };

export default function ({ run }) {
  const id = `${run}${String(exec.scenario.iterationInTest).padStart(10, '0')}`;
  // One token for the event: every retry has the same one, another event another.
  const headers = { 'Idempotency-Key': `retry-${id}` };
  for (let attempt = 1; attempt <= 10; attempt++) {
    const answer = http.post(`${url}/api/verve/accept?id=${id}`, null, { headers, tags: { name: 'accept' } });
    const lost = answer.status === 0 || answer.status === 503 || Math.random() < lose;
    if (lost && attempt < 10) {
      continue; // a client waits here, longer each time
    }
    const again = answer.headers['Verve-Replayed'] === 'true';
    check(answer, { 'the id is ok, for a retry too': (r) => r.status === 200 && r.body === 'ok' });
    unique.add(1);
    replayed.add(again);
    return;
  }
}
