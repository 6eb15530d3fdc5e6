package stream

import (
	"cmp"
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/sasl"
	"github.com/twmb/franz-go/pkg/sasl/plain"
	"github.com/twmb/franz-go/pkg/sasl/scram"

	"verve/internal/setting"
)

// KafkaConfig has the topics, and how to reach their brokers.
type KafkaConfig struct {
	Brokers []string // host:port
	Topic   string   // of the records

	// KeysTopic is that of the records by key; empty: DefaultKeysTopic.
	KeysTopic string

	// TLS, if not nil, is used for every connection.
	TLS *tls.Config

	// SASL is empty, PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512, in upper or lower case. The
	// password is the content of PasswordFile without the line end. It is read
	// for each connection, so a new password in the file is used without a
	// restart.
	SASL         string
	User         string // for SASL
	PasswordFile string // see SASL

	// Dial opens the connections to the brokers; nil: TCP, or TLS with TLS.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// DefaultKeysTopic is the topic of the records by key.
const DefaultKeysTopic = "verve.unique-ids-by-key"

func (c *KafkaConfig) keysTopic() string { return cmp.Or(c.KeysTopic, DefaultKeysTopic) }

func badTopic(topic string) bool {
	return topic == "" || len(topic) > 249 || topic == "." || topic == ".." ||
		strings.Trim(topic, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") != ""
}

// Check returns an error, which names the setting, for settings that no broker can make
// work. It dials nothing, but reads the password file. No brokers is no error.
func (c *KafkaConfig) Check() error {
	if err := checkBrokers(c.Brokers); err != nil {
		return err
	}
	const allowed = "Kafka allows 1 to 249 letters, digits, dots, underscores and hyphens, and neither . nor .."
	switch {
	case c.Topic == "" && len(c.Brokers) == 0: // nothing is sent anywhere
	case badTopic(c.Topic):
		return setting.Errorf("kafka-topic", allowed)
	case badTopic(c.keysTopic()):
		return setting.Errorf("kafka-keys-topic", allowed)
	case slices.Contains(internalTopics, c.Topic):
		return setting.Errorf("kafka-topic", "it is a topic of the brokers' own, which they let nothing else write to")
	case slices.Contains(internalTopics, c.keysTopic()):
		return setting.Errorf("kafka-keys-topic", "it is a topic of the brokers' own, which they let nothing else write to")
	case c.keysTopic() == c.Topic:
		return setting.Errorf("kafka-keys-topic", "want another topic than --kafka-topic")
	case collides(c.keysTopic(), c.Topic):
		return setting.Errorf("kafka-keys-topic", "Kafka makes no topic whose name differs from that of another, --kafka-topic, in dots and underscores only")
	}
	switch {
	case c.SASL == "" && c.User != "":
		return setting.Errorf("kafka-user", "it is used with --kafka-sasl only, which is missing")
	case c.SASL == "" && c.PasswordFile != "":
		return setting.Errorf("kafka-password-file", "it is used with --kafka-sasl only, which is missing")
	case c.SASL == "":
		return nil
	}
	if _, err := c.mechanism(); err != nil {
		return err
	}
	switch {
	case c.User == "":
		return setting.Errorf("kafka-sasl", "--kafka-user is missing")
	case c.PasswordFile == "":
		return setting.Errorf("kafka-sasl", "--kafka-password-file is missing")
	}
	switch p, err := c.password(); {
	case err != nil:
		return setting.Errorf("kafka-password-file", "%v", setting.Cause(err))
	case p == "":
		return setting.Errorf("kafka-password-file", "the file is empty")
	case !utf8.ValidString(p), strings.ContainsRune(p, 0):
		return setting.Errorf("kafka-password-file", "want text in UTF-8, as brokers take no other password")
	}
	return nil
}

// internalTopics are refused by brokers.
var internalTopics = []string{"__consumer_offsets", "__transaction_state", "__share_group_state", "__cluster_metadata"}

// collides reports whether brokers take two topics for one in the names of their metrics.
func collides(a, b string) bool {
	return strings.ReplaceAll(a, ".", "_") == strings.ReplaceAll(b, ".", "_")
}

func (c *KafkaConfig) password() (string, error) {
	b, err := setting.ReadFile(c.PasswordFile)
	if err != nil {
		return "", fmt.Errorf("kafka password file: %w", err)
	}
	return strings.TrimRight(string(b), "\r\n"), nil
}

func (c *KafkaConfig) mechanism() (sasl.Mechanism, error) {
	scramAuth := func(context.Context) (scram.Auth, error) {
		p, err := c.password()
		return scram.Auth{User: c.User, Pass: p}, err
	}
	switch strings.ToUpper(c.SASL) {
	case "PLAIN":
		return plain.Plain(func(context.Context) (plain.Auth, error) {
			p, err := c.password()
			return plain.Auth{User: c.User, Pass: p}, err
		}), nil
	case "SCRAM-SHA-256":
		return scram.Sha256(scramAuth), nil
	case "SCRAM-SHA-512":
		return scram.Sha512(scramAuth), nil
	}
	return nil, setting.Errorf("kafka-sasl", "want PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512")
}

// client makes a client of the brokers. It dials nothing yet.
func (c *KafkaConfig) client(more ...kgo.Opt) (*kgo.Client, error) {
	opts := []kgo.Opt{
		kgo.SeedBrokers(c.Brokers...),
		kgo.ClientID("verve"),
		kgo.DisableClientMetrics(), // this program has its own
		// Each step of a session has a deadline of its own; within it the client
		// tries as often as it likes.
		kgo.RetryTimeout(stepWait),
		kgo.DialTimeout(stepWait / 2),
		// So a topic that appears, or a leader that moves, is noticed soon.
		kgo.MetadataMinAge(250 * time.Millisecond),
		// This is how long a broker holds a fetch for which it has no records.
		kgo.FetchMaxWait(250 * time.Millisecond),
	}
	switch {
	case c.Dial != nil:
		opts = append(opts, kgo.Dialer(c.Dial))
	case c.TLS != nil:
		opts = append(opts, kgo.DialTLSConfig(c.TLS))
	}
	if c.SASL != "" {
		m, err := c.mechanism()
		if err != nil {
			return nil, err
		}
		opts = append(opts, kgo.SASL(m))
	}
	return kgo.NewClient(append(opts, more...)...)
}
