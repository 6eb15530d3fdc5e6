// A moderate load for hours, over many windows: memory, descriptors and latency
// must not creep. Watch verve_dedup_bytes, process_resident_memory_bytes and
// process_open_fds meanwhile.
//
//   k6 run -e DURATION=8h bench/k6/soak.js
//
// RATE      requests a second  500
// DURATION  how long           1h
// VUS       virtual users      100
import { accept, setup, unhurried } from './accept.js';

export { setup };
export default accept;

const vus = Number(__ENV.VUS || 100);

export const options = {
  scenarios: {
    soak: {
      executor: 'constant-arrival-rate',
      rate: Number(__ENV.RATE || 500),
      timeUnit: '1s',
      duration: __ENV.DURATION || '1h',
      preAllocatedVUs: vus,
      maxVUs: 4 * vus,
    },
  },
  thresholds: unhurried,
  // Hours of samples would fill the memory of k6 itself.
  systemTags: ['status', 'method', 'name', 'scenario', 'error_code'],
  summaryTrendStats: ['avg', 'min', 'med', 'max', 'p(95)', 'p(99)'],
};
