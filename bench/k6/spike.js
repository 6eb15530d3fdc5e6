// A calm load, then at once many times as much, then calm again. In the spike
// the server may answer 503; it may not give a wrong answer, and afterwards it
// must be as quick as before.
//
//   k6 run bench/k6/spike.js
//
// RATE   requests a second when calm    500
// SPIKE  times as many in the spike     10
// PHASE  length of each phase, seconds  20
import { accept, always, latency, setup } from './accept.js';

export { setup };
export default accept;

const calm = Number(__ENV.RATE || 500);
const spike = calm * Number(__ENV.SPIKE || 10);
const seconds = Number(__ENV.PHASE || 20);

const phase = (n, rate) => ({
  executor: 'constant-arrival-rate',
  rate,
  timeUnit: '1s',
  duration: `${seconds}s`,
  startTime: `${n * seconds}s`,
  preAllocatedVUs: 100,
  maxVUs: 1000,
  gracefulStop: '5s',
});

export const options = {
  scenarios: { before: phase(0, calm), spike: phase(1, spike), after: phase(2, calm) },
  thresholds: {
    ...always,
    'http_req_failed{scenario:before}': ['rate<0.001'],
    'http_req_failed{scenario:after}': ['rate<0.001'],
    'http_req_duration{scenario:before}': latency,
    'http_req_duration{scenario:after}': latency,
  },
};
