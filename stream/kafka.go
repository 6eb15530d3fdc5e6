package stream

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"math/bits"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"

	"verve/internal/retry"
)

// Why a record is visible once.
//
// A record is identified by its key. The spool delivers it at least once. Two mechanisms
// together keep a second copy from becoming visible:
//
//   - The fence. A session (one kgo client) begins with InitProducerID, for a transactional
//     id of the group and instance, or of the group alone in group scope. When that returns,
//     every earlier transaction of the id is committed or aborted, and no request of an
//     earlier session can become visible any more, however late it arrives. Idempotence
//     alone does not give that: it holds for one producer id, and a restarted process has
//     a new one.
//   - The look. Records whose outcome is open are looked for in the topic, after the fence
//     and before they are produced. After the fence the answer cannot change.
//
// The outcome is open for every record that was in the spool when the process started, and
// for every batch after an attempt that failed, in whatever way; the session is then dropped
// as well. In group scope other processes publish the same records, so all of them are
// looked for, every time.
//
// DESIGN.md, "Records", lists what follows a kill at each moment. A lost acknowledgement, a
// leader that moves and a broker that is killed are the same cases without a kill of this
// process: the client retries under the same producer id and sequence number, which the
// broker recognises. When an attempt is given up the session is dropped, and fence and look
// start again.
//
// Group scope. The instances share one transactional id, so an instance that begins a
// session fences the others. That makes the id a lock around look and produce: the
// instance that was fenced finds the record of the other one when it looks again. To fence
// as rarely as possible, an instance without a session first looks without one, and begins
// one only if a record is missing.
//
// Without transactions. If the broker refuses them (authorisation of the transactional id,
// or not implemented), idempotence and the look are left. Then a second copy can become
// visible in two cases: the broker appends a produce request of a killed process after the
// next process has looked, or two instances of a group look and produce at the same time.
// `verve totals` names that copy and does not count it. After a kill between the records
// by key and their record, those by key are sent again with it; `verve totals --by-key`
// names their copies.
//
// Order: all records of an identity go to one partition, one batch at a time,
// and the next batch follows only when the last one is visible. When the number
// of partitions grows an identity moves to another at its next session.

const (
	// stepWait bounds each step of a session: finding the topic, the fence, a
	// produce. A broker that answers at all answers faster; a longer wait would
	// only delay the error.
	stepWait = 10 * time.Second

	// transactionTimeout is the time after which the broker aborts the transaction of a
	// process that is gone, which holds up readers of the partition. It has to outlast a
	// produce and a commit, stepWait each. Each record by key adds keyTime: any network
	// should carry 5,000 of them, or one megabyte, in a second. If it does not, or the
	// broker takes only small batches or has a quota, the time doubles after each attempt
	// that ran out of it, up to maxSlow times, which is beyond what brokers allow by default.
	transactionTimeout = 25 * time.Second
	keyTime            = 200 * time.Microsecond
	maxSlow            = 32

	// keysAtOnce is how many records by key are handed to the client before their
	// acknowledgement is waited for: a batch or two of the size that brokers take by
	// default, and half of what the client buffers before it blocks.
	keysAtOnce = 5000

	// stopWait is how much longer a commit that is on its way may take after the
	// stop: to give it up would leave the outcome open without need.
	stopWait = time.Second

	// lookStall ends a read that makes no progress. A read of committed records waits
	// until the broker has ended the transaction of a killed process, which it checks
	// every ten seconds. A transaction of 125,000 keys has twice transactionTimeout.
	lookStall = 2*transactionTimeout + 20*time.Second

	// lookMargin covers the difference of the broker's clock to this one's on
	// topics that stamp records with the time of appending.
	lookMargin = time.Hour

	// offMargin is less than the default window. So the records of minutes are tried one
	// by one, and only those that the broker refuses get another time than the end of
	// their window. Records of shorter windows may get it although the broker would have
	// taken them, if they are within an eighth of the topic's limit.
	offMargin = 30 * time.Second

	// minTransactionTimeout is the shortest that is tried if the broker's
	// transaction.max.timeout.ms is below transactionTimeout. If the broker ends a
	// transaction because it took longer, its outcome is open, and the next session
	// finds it out by fence and look.
	minTransactionTimeout = time.Second

	// refusedFor is how long a session without transactions lasts: the next one finds out
	// whether the right to them was granted.
	refusedFor = 10 * time.Minute

	// maxTooShort is how many transactions in a row may run out of the longest timeout that the
	// broker allows. Then the records are sent without transactions: otherwise they would hold
	// up all others for ever.
	maxTooShort = 4

	// rightsWait bounds the check whether the Kafka user may read the topic: a broker
	// that refuses does so at once.
	rightsWait = time.Second
)

// kafkaSink delivers to a topic.
type kafkaSink struct {
	cfg  KafkaConfig
	log  zerolog.Logger
	step func(string)

	session *session // nil: the next delivery starts one

	// unsure is the index up to which a record may be in the topic without an
	// acknowledgement in the spool: all that was in the spool at the start, and every batch that
	// has failed.
	unsure uint64
	// single is the index up to which records are sent one by one, to find the
	// one that made a batch fail.
	single uint64

	// presentTo is the index of the last record that is sent with the present time as its
	// timestamp, because the broker refused the end of its window. To wait does not help: a time
	// that is too old only gets older, and a time far ahead would hold up all later records.
	presentTo uint64
	// offBy is by how much the end of that window was in the past, or in the future if it is
	// negative, when the broker refused it. 0: a later record was taken with its own time.
	offBy time.Duration

	room uint64 // for how many keys the transactions of the next session have time; it only grows
	// slow is by how much more time records by key have in the next session, a power of two. It
	// doubles when it was too short for them, and is 1 again when they are delivered.
	slow uint
	// tooShort is how many transactions in a row ran out of a timeout that the broker does not
	// allow to be longer.
	tooShort int
	// most is how many records are sent at once, and atOnce how many by key: batchSize and
	// keysAtOnce, or less where the topic takes only smaller batches. most is 0 behind one that
	// was refused by itself: the next is tried alone, too, and if it is taken all are again.
	most, atOnce int

	refused   bool          // transactions were refused when the last session began
	allowed   time.Duration // what the broker allows transactions to take; 0: it has not refused any
	conflicts atomic.Uint64
	closing   sync.WaitGroup // clients on their way out
}

// session is a client whose producer id is the newest of its identity.
type session struct {
	client        *kgo.Client
	identity      string
	partition     int32
	keysPartition int32  // in the topic of the records by key
	room          uint64 // for how many keys its transactions have time; 0: it is not prepared for any
	transactional bool
	last          *lastError
	began         time.Time
	timeout       time.Duration // of its transactions
	limited       bool          // the broker does not allow a longer one
	keysWait      time.Duration // stepWait of records by key
}

func newKafkaSink(cfg KafkaConfig, log zerolog.Logger, unsure uint64, step func(string)) *kafkaSink {
	return &kafkaSink{cfg: cfg, log: log, unsure: unsure, step: step, slow: 1, most: batchSize, atOnce: keysAtOnce}
}

func (k *kafkaSink) close() {
	k.drop()
	k.closing.Wait()
}

// drop gives the session up. It closes the client in a goroutine, because closing may wait for
// a broker. Closing fails the records that the client still buffers, as it should.
func (k *kafkaSink) drop() {
	if k.session == nil {
		return
	}
	client := k.session.client
	k.session = nil
	k.closing.Go(client.Close)
}

func (k *kafkaSink) deliver(ctx context.Context, batch []spooled) (int, error) {
	identity, scope := batch[0].record.identity(), batch[0].record.Scope
	other := func(e spooled) bool { return e.record.identity() != identity || e.record.Scope != scope }
	if i := slices.IndexFunc(batch, other); i > 0 {
		batch = batch[:i] // the name was changed between two starts
	}
	for {
		if n := k.refusedAlike(batch); n > 0 {
			batch = batch[:n]
		} else if batch[0].index <= k.single {
			batch = batch[:1]
		}
		batch = batch[:min(len(batch), max(k.most, 1))]
		err := k.send(ctx, batch, identity, scope == ScopeGroup)
		last := batch[len(batch)-1].index
		if err == nil {
			if last > k.presentTo {
				k.offBy = 0
			}
			if k.most == 0 {
				k.most = batchSize
			}
			return len(batch), nil
		}
		poison, refused := errors.AsType[*poisonError](err)
		switch {
		case !refused || ctx.Err() != nil:
			return 0, err
		case tooLarge(err) && len(batch) > 1: // not one by one: those of short windows would come faster than they go
			k.most = len(batch) / 2
		case poison.ofKeys && k.atOnce > 1 && tooLarge(err):
			k.most, k.atOnce = batchSize, max(k.atOnce/8, 1) // the topic takes smaller batches only
		case errors.Is(err, kerr.InvalidTimestamp) && k.presentTo >= last:
			return 0, fmt.Errorf("%w, with the present time: its clock and the one here differ by more than the topic allows (message.timestamp.before.max.ms, message.timestamp.after.max.ms)", errors.Unwrap(err))
		case errors.Is(err, kerr.InvalidTimestamp) && len(batch) == 1:
			if k.presentTo+1 < last || k.presentTo == 0 { // once for those in a row
				k.log.Warn().Str("key", batch[0].record.Key()).
					Msg("broker refused the timestamp of a record (the end of its window) as too old or too far ahead (message.timestamp.before.max.ms, message.timestamp.after.max.ms): such records are sent with the present time instead")
			}
			k.presentTo, k.offBy = last, time.Since(batch[0].record.end())
		case len(batch) == 1:
			k.most, k.atOnce = 0, keysAtOnce // one that is too large by itself says nothing about others
			return 0, err
		default:
			k.single, k.offBy = last, 0 // one of them is at fault: each by itself
		}
	}
}

// refusedAlike returns how many records at the front of the batch are sent with the present
// time: those up to presentTo, and those directly after them whose time is off by as much. To
// try each with its own time would take two sessions per record. Records of short windows come
// faster than that, so all of them would be too old in the end.
//
// The limit of the topic is not known. So a record already counts if its time is off by offMargin
// less, or by an eighth less: otherwise each record of a short window would be tried with its
// own time, because it is a little younger than the one before.
func (k *kafkaSink) refusedAlike(batch []spooled) (n int) {
	if k.offBy == 0 {
		return 0
	}
	now, margin := time.Now(), min(k.offBy.Abs()/8, offMargin)
	for n < len(batch) && batch[n].index <= k.presentTo+1 {
		if batch[n].index > k.presentTo {
			off := now.Sub(batch[n].record.end())
			if off > 0 != (k.offBy > 0) || off.Abs() < k.offBy.Abs()-margin {
				break
			}
			k.presentTo = batch[n].index
		}
		n++
	}
	return n
}

// send makes the records of one identity visible. After an error the session is
// dropped and the outcome is open. That includes a *poisonError, which means that the
// broker refuses one of the records.
func (k *kafkaSink) send(ctx context.Context, batch []spooled, identity string, group bool) error {
	if keys := keysOf(batch); keys > k.room {
		k.room = max(batchKeys, uint64(1)<<bits.Len64(keys))
	}
	if s := k.session; s != nil && (s.identity != identity || s.room < k.room || !s.transactional && time.Since(s.began) > refusedFor) {
		k.drop()
	}
	if group && k.session == nil {
		missing, err := k.look(ctx, batch)
		if err == nil && len(missing) == 0 {
			return nil
		}
		// If the look failed, or records are missing, it is repeated below, in a session.
	}
	if k.session == nil {
		if err := k.open(ctx, identity); err != nil {
			return fmt.Errorf("begin a session with the broker: %w", err)
		}
	}
	missing := batch
	if group || batch[0].index <= k.unsure {
		var err error
		if missing, err = k.look(ctx, batch); err != nil {
			k.drop()
			return fmt.Errorf("look for records that are there already: %w", err)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	began := time.Now()
	err := k.produce(ctx, missing)
	if err == nil {
		k.slow, k.tooShort = 1, 0
		return nil
	}
	if keysOf(missing) > 0 {
		k.giveTime(err, time.Since(began))
	}
	k.drop()
	k.unsure = max(k.unsure, batch[len(batch)-1].index)
	if errors.Is(err, kerr.InvalidProducerEpoch) || errors.Is(err, kerr.ProducerFenced) {
		err = fmt.Errorf("%w (another process publishes as %q, or the broker timed the transaction out)", err, identity)
	}
	return err
}

// giveTime gives the next attempt to send records by key more time, if this one may have had too
// little. took is how long this one took.
func (k *kafkaSink) giveTime(err error, took time.Duration) {
	s := k.session
	switch {
	case errors.Is(err, errNoAcknowledgement):
		k.slow = min(2*k.slow, maxSlow)
	case s.transactional && took >= s.timeout/2: // a broker may abort early
		k.slow = min(2*k.slow, maxSlow)
		if s.limited {
			k.tooShort++
		}
	}
}

// poison reports whether an error is about a record that no retry can help. All other
// errors, those of authorisation and unknown ones too, are the broker's, and may pass.
func poison(err error) bool {
	return tooLarge(err) || errors.Is(err, kerr.InvalidRecord) || errors.Is(err, kerr.InvalidTimestamp)
}

func tooLarge(err error) bool {
	return errors.Is(err, kerr.MessageTooLarge) || errors.Is(err, kerr.RecordListTooLarge)
}

// keysOf returns how many keys the records of a batch have.
func keysOf(batch []spooled) (n uint64) {
	for i := range batch {
		n += batch[i].record.Keys
	}
	return n
}

// timeOf is the timestamp of a record and of its records by key.
func (k *kafkaSink) timeOf(e *spooled) time.Time {
	if e.index <= k.presentTo {
		return time.Now()
	}
	return e.record.end()
}

// open starts a session, in transactions if the broker allows them.
func (k *kafkaSink) open(ctx context.Context, identity string) error {
	wanted := transactionTimeout + time.Duration(k.room)*keyTime
	if k.room > 0 {
		wanted *= time.Duration(k.slow)
	}
	timeout := min(wanted, cmp.Or(k.allowed, wanted))
	if k.tooShort >= maxTooShort {
		return k.openWithout(ctx, identity, fmt.Errorf("%d transactions took longer than it allows (transaction.max.timeout.ms)", k.tooShort))
	}
	s, err := k.connect(ctx, identity, timeout)
	for errors.Is(err, kerr.InvalidTransactionTimeout) && timeout > minTransactionTimeout {
		timeout = max(timeout/2, minTransactionTimeout)
		k.allowed = timeout
		if s, err = k.connect(ctx, identity, timeout); err == nil {
			k.log.Info().Str("timeout", timeout.String()).Str("wanted", wanted.String()).
				Msg("broker allows shorter transactions only (transaction.max.timeout.ms): using this timeout")
		}
	}
	if refusal(err) {
		return k.openWithout(ctx, identity, err)
	}
	if err == nil {
		if k.refused {
			k.log.Info().Msg("broker accepts transactions again")
		}
		k.refused = false
		s.limited = timeout < wanted
	}
	k.session = s
	return k.lacks("", "", err)
}

// openWithout starts a session without transactions. It logs the reason, once until the broker
// accepts transactions again.
func (k *kafkaSink) openWithout(ctx context.Context, identity string, reason error) (err error) {
	if !k.refused {
		k.log.Warn().Err(k.lacks("", "", reason)).Str("transactional_id", transactionalID(identity)).
			Msg("broker refuses transactions: records are sent without them, so a kill may leave a second copy of a record")
	}
	k.refused = true
	k.session, err = k.connect(ctx, identity, 0)
	return k.lacks("", "", err)
}

// connect starts a session. When it returns one, the topic is there, also that of the records by
// key if records have had keys, and the fence is up. timeout is that of its transactions; 0: it
// has none.
func (k *kafkaSink) connect(ctx context.Context, identity string, timeout time.Duration) (*session, error) {
	s := &session{
		identity: identity, room: k.room, transactional: timeout > 0, last: new(lastError),
		began: time.Now(), timeout: timeout, keysWait: stepWait * time.Duration(k.slow),
	}
	options := []kgo.Opt{
		kgo.WithHooks(s.last),
		kgo.WithLogger(s.last),
		kgo.RecordPartitioner(kgo.ManualPartitioner()),
		kgo.RequiredAcks(kgo.AllISRAcks()),
		kgo.AllowAutoTopicCreation(),
		kgo.UnknownTopicRetries(-1), // a missing topic is waited for
		kgo.ProducerLinger(0),       // the batch is complete when it is handed over
	}
	if s.room > 0 {
		options = append(options, kgo.ProducerBatchCompression(kgo.SnappyCompression())) // records by key are alike: a sixth remains
	} else {
		options = append(options, kgo.ProducerBatchCompression(kgo.NoCompression())) // a quarter of a kilobyte a minute
	}
	if s.transactional {
		options = append(options, kgo.TransactionalID(transactionalID(identity)), kgo.TransactionTimeout(timeout))
	}
	var err error
	if s.client, err = k.cfg.client(options...); err != nil {
		return nil, err
	}
	s.partition, err = k.findPartition(ctx, s.client, k.cfg.Topic, identity)
	if err == nil && s.room > 0 {
		s.keysPartition, err = k.findPartition(ctx, s.client, k.cfg.keysTopic(), identity)
	}
	if err == nil {
		err = s.fence(ctx)
	}
	if err != nil {
		k.closing.Go(s.client.Close)
		return nil, s.last.explain(err)
	}
	return s, nil
}

// lacks returns err and, if the broker has refused a right, adds the ACL that would grant it.
// operation is the ACL operation on the topic that was tried; empty: none was.
func (k *kafkaSink) lacks(operation, topic string, err error) error {
	switch {
	case operation != "" && errors.Is(err, kerr.TopicAuthorizationFailed):
		return fmt.Errorf("%w (the Kafka user lacks the ACL %s on topic %s)", err, operation, topic)
	case errors.Is(err, kerr.TransactionalIDAuthorizationFailed):
		return fmt.Errorf("%w (the Kafka user lacks the ACLs Write and Describe on transactional ids with the prefix %s)", err, transactionalID(""))
	case errors.Is(err, kerr.ClusterAuthorizationFailed):
		return fmt.Errorf("%w (the Kafka user lacks the ACL Write on topic %s, or, if the broker is older than 2.8, IdempotentWrite on the cluster)", err, k.cfg.Topic)
	}
	return err
}

// prepare does early what the first record would need. It begins the session of an
// identity, except in a group, where that would fence the others. And it checks whether
// the user may read the topic: that right is needed only when the outcome of a
// delivery is open, perhaps after weeks, and then nothing goes on without it.
func (k *kafkaSink) prepare(ctx context.Context, identity string, group bool) error {
	if !group {
		if err := k.open(ctx, identity); err != nil {
			return fmt.Errorf("begin a session with the broker: %w", err)
		}
	}
	client, err := k.cfg.client(kgo.ConsumePartitions(map[string]map[int32]kgo.Offset{
		k.cfg.Topic: {0: kgo.NewOffset().AtEnd()},
	}))
	if err != nil {
		return err
	}
	defer k.closing.Go(client.Close)
	ctx, cancel := context.WithTimeout(ctx, rightsWait)
	defer cancel()
	for _, e := range client.PollFetches(ctx).Errors() {
		if errors.Is(e.Err, kerr.TopicAuthorizationFailed) {
			k.log.Warn().Err(k.lacks("Read", k.cfg.Topic, e.Err)).
				Msg("the topic cannot be read: records are delivered, but after a kill or a lost reply delivery stops until the right to read is granted")
		}
	}
	return nil
}

// transactionalID has a prefix so that one ACL can cover every instance.
func transactionalID(identity string) string { return "verve/" + identity }

// errNoTransactions is the error for a broker without InitProducerID.
var errNoTransactions = errors.New("broker is too old for transactions")

func refusal(err error) bool {
	return errors.Is(err, kerr.TransactionalIDAuthorizationFailed) || errors.Is(err, kerr.UnsupportedVersion) ||
		errors.Is(err, errNoTransactions) || errors.Is(err, kerr.InvalidTransactionTimeout)
}

// fence gets a producer id. If the client is transactional, the broker then ends every earlier
// session of the same transactional id.
func (s *session) fence(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, stepWait)
	defer cancel()
	id, _, err := s.client.ProducerID(ctx)
	switch {
	case errors.Is(err, kerr.CoordinatorNotAvailable):
		return fmt.Errorf("get a producer id: %w (with fewer brokers than transaction.state.log.replication.factor there is none)", err)
	case err != nil:
		return fmt.Errorf("get a producer id: %w", err)
	case id < 0:
		return errNoTransactions
	}
	return nil
}

// findPartition waits for the topic, which the broker may create on this request, and
// returns the partition of the identity.
func (k *kafkaSink) findPartition(ctx context.Context, client *kgo.Client, name, identity string) (int32, error) {
	ctx, cancel := context.WithTimeout(ctx, stepWait)
	defer cancel()
	var missing error
	for {
		req := kmsg.NewPtrMetadataRequest()
		topic := kmsg.NewMetadataRequestTopic()
		topic.Topic = kmsg.StringPtr(name)
		req.Topics = append(req.Topics, topic)
		req.AllowAutoTopicCreation = true
		resp, err := req.RequestWith(ctx, client)
		if err != nil {
			return 0, fmt.Errorf("find topic %s: %w", name, cmp.Or(missing, err))
		}
		if len(resp.Topics) != 1 {
			return 0, fmt.Errorf("find topic %s: broker answers about %d topics", name, len(resp.Topics))
		}
		t := &resp.Topics[0]
		err = kerr.ErrorForCode(t.ErrorCode)
		if err == nil && len(t.Partitions) > 0 {
			return partitionFor(identity, len(t.Partitions)), nil
		}
		if err != nil && !kerr.IsRetriable(err) {
			return 0, k.lacks("Describe, and Create if it is missing,", name, fmt.Errorf("find topic %s: %w", name, err))
		}
		missing = err // nil: the topic is being created
		if err := retry.Sleep(ctx, 250*time.Millisecond); err != nil {
			return 0, fmt.Errorf("find topic %s: %w", name, cmp.Or(missing, err))
		}
	}
}

// partitionFor gives every record of an identity the same partition.
func partitionFor(identity string, partitions int) int32 {
	h := fnv.New32a()
	h.Write([]byte(identity))
	return int32(h.Sum32() % uint32(partitions))
}

// produce makes all the records visible. After an error the outcome is open.
func (k *kafkaSink) produce(ctx context.Context, entries []spooled) error {
	s := k.session
	if s.transactional {
		if err := s.client.BeginTransaction(); err != nil {
			return fmt.Errorf("begin a transaction: %w", err)
		}
	}
	if keysOf(entries) > 0 {
		if err := k.sendKeys(ctx, entries); err != nil {
			return err
		}
		k.step(stepKeys)
	}
	records := make([]*kgo.Record, len(entries))
	for i := range entries {
		records[i] = &kgo.Record{
			Topic:     k.cfg.Topic,
			Partition: s.partition,
			Key:       []byte(entries[i].record.Key()),
			Value:     entries[i].value,
			Timestamp: k.timeOf(&entries[i]),
			Headers:   schema,
		}
	}
	if err := k.sendRecords(ctx, records, stepWait); err != nil {
		return err
	}
	k.step(stepProduced)
	if s.transactional {
		if err := s.commit(ctx); err != nil {
			return fmt.Errorf("commit: %w", err)
		}
	}
	k.step(stepCommitted)
	return nil
}

var schema = []kgo.RecordHeader{{Key: schemaHeader, Value: []byte(schemaVersion)}}

// sendKeys hands the records by key to the broker, atOnce at a time: so the memory that they
// take, and the size of a request, do not depend on how many there are.
func (k *kafkaSink) sendKeys(ctx context.Context, entries []spooled) error {
	records := make([]*kgo.Record, 0, min(uint64(k.atOnce), keysOf(entries)))
	send := func() error {
		err := k.sendRecords(ctx, records, k.session.keysWait)
		records = records[:0]
		if poison, ok := errors.AsType[*poisonError](err); ok {
			poison.ofKeys = true
		}
		return err
	}
	for i := range entries {
		lines, of, at := newKeyJSON(&entries[i].record), entries[i].record.Key()+"/", k.timeOf(&entries[i])
		for key, unique := range entries[i].keys.All() {
			records = append(records, &kgo.Record{
				Topic:     k.cfg.keysTopic(),
				Partition: k.session.keysPartition,
				Key:       append([]byte(of), key...),
				Value:     lines.line(key, unique),
				Timestamp: at,
				Headers:   schema,
			})
			if len(records) == k.atOnce {
				if err := send(); err != nil {
					return err
				}
			}
		}
	}
	return send()
}

var errNoAcknowledgement = errors.New("no acknowledgement")

// sendRecords hands records of one topic to the broker and waits until it has acknowledged
// them.
func (k *kafkaSink) sendRecords(ctx context.Context, records []*kgo.Record, wait time.Duration) error {
	ctx, cancel := context.WithTimeoutCause(ctx, wait, fmt.Errorf("%w within %s", errNoAcknowledgement, wait))
	defer cancel()
	client, last := k.session.client, k.session.last
	last.err.Store(nil) // what was before is over
	// The records do not have ctx: the client must not give a record up while its outcome is
	// open. Only the wait for them is bounded.
	var results kgo.ProduceResults
	if await(ctx, launch(func() { results = client.ProduceSync(context.Background(), records...) })) != nil {
		return fmt.Errorf("produce: %w", last.explain(context.Cause(ctx)))
	}
	var failed error
	for _, r := range results {
		// The first failure is the cause of the later ones, unless one of these is
		// about its own record.
		if failed == nil || poison(r.Err) && !poison(failed) {
			failed = cmp.Or(r.Err, failed)
		}
	}
	if failed != nil {
		failed = k.lacks("Write", records[0].Topic, fmt.Errorf("produce: %w", failed))
		if poison(failed) {
			return &poisonError{err: failed}
		}
	}
	return failed
}

func (s *session) commit(ctx context.Context) error {
	cctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stepWait)
	defer cancel()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(stopWait, cancel) })()
	// Nothing is buffered, all callbacks have returned: this aborts nothing. It
	// is called for the lock that it takes. kgo 1.22.2 hands the records of a topic
	// that is new to the client to their broker before it stores the topic's
	// partitions, under that lock; a broker that acknowledges faster than that
	// leaves EndTransaction with a transaction it believes empty, which it aborts,
	// and returns nil (TestKafkaFirstCommitOfASessionIsACommit).
	if err := s.client.AbortBufferedRecords(cctx); err != nil {
		return err
	}
	return s.client.EndTransaction(cctx, kgo.TryCommit)
}
