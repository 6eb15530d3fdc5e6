package redis

import (
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/redis/rueidis"

	"verve/internal/setting"
)

// redisParameters are the query parameters of a URL that have an effect here.
// Others that rueidis knows are set by this program.
var redisParameters = []string{"addr", "db", "master_set", "protocol", "skip_verify"}

// redisOption makes the settings of the client from the URLs. Its errors quote nothing
// that may be a password.
func redisOption(cfg *Config) (rueidis.ClientOption, error) {
	option, err := joinURLs(cfg.URLs)
	if err != nil {
		return option, err
	}
	if len(option.InitAddress) > 1 && option.Sentinel.MasterSet == "" && option.SelectDB != 0 {
		return option, setting.Errorf("redis-url", "a cluster has the database 0 only")
	}
	if option.Sentinel.MasterSet == "" && (cfg.SentinelUser != "" || cfg.SentinelPassword != "") {
		name := "redis-sentinel-password-file"
		if cfg.SentinelPassword == "" {
			name = "redis-sentinel-user"
		}
		return option, setting.Errorf(name, "no --redis-url names a Sentinel (redis-sentinel://HOST:PORT?master_set=NAME)")
	}
	if option.Sentinel.MasterSet != "" {
		// A missed event would leave the client with the old master for good.
		option.Sentinel.TopologyRefreshInterval = time.Second
		option.Sentinel.Username, option.Sentinel.Password = option.Username, option.Password
		if cfg.SentinelUser != "" || cfg.SentinelPassword != "" {
			option.Sentinel.Username, option.Sentinel.Password = cfg.SentinelUser, cfg.SentinelPassword
		}
		option.Sentinel.TLSConfig = option.TLSConfig
		option.Sentinel.Dialer.Timeout = dialTimeout
	}
	if option.TLSConfig != nil {
		// rueidis sets the host of the first URL here, and every node would need a
		// certificate for it. If it is empty, crypto/tls checks the name that is dialled.
		option.TLSConfig.ServerName = ""
	}
	option.Dialer.Timeout = dialTimeout
	option.ConnWriteTimeout = replyTimeout
	option.PipelineMultiplex = -1 // one connection: batches are already large
	option.DisableRetry = true    // a batch is repeated here, where that is safe
	option.DisableCache = true
	option.ClientName = "verve"
	option.ClusterOption.ShardsRefreshInterval = time.Second
	option.ClusterOption.MaxMovedRedirections = 3
	return option, nil
}

// joinURLs makes one setting from the URLs. All but hosts and ports are those of the first.
func joinURLs(urls []string) (option rueidis.ClientOption, err error) {
	if len(urls) == 0 {
		return option, setting.Errorf("redis-url", "want a URL")
	}
	var scheme string
	seen := make(map[string]bool)
	for i, s := range urls {
		u, o, why := redisURL(s, i == 0)
		switch {
		case why != "":
		case i == 0:
			scheme, option = u.Scheme, o
		case u.Scheme != scheme || scheme == "unix":
			why = "further URLs have the scheme of the first, which is not unix"
		case differs(option, o):
			why = "the user, the password, the database or a parameter differs from that of the first URL, which is for all"
		default:
			option.InitAddress = append(option.InitAddress, o.InitAddress...)
		}
		for _, address := range o.InitAddress {
			if seen[address] && why == "" {
				why = "the address is there twice"
			}
			seen[address] = true
		}
		if why != "" && len(urls) > 1 {
			why = "URL " + strconv.Itoa(i+1) + ": " + why
		}
		if why != "" {
			return option, setting.Errorf("redis-url", "%s", why)
		}
	}
	return option, nil
}

// redisURL parses one URL, or returns why it cannot work. The first names the master
// set of Sentinels.
func redisURL(s string, first bool) (u *url.URL, o rueidis.ClientOption, why string) {
	u, err := url.Parse(s)
	switch {
	case strings.ContainsAny(s, "\"'`"):
		return nil, o, "there is a quote in it: env files keep the quotes around a value; in a password it is written %22 or %27"
	case err != nil, strings.Contains(u.Path+u.RawQuery+u.Fragment, "@") && u.Scheme != "unix":
		// The error of url.Parse quotes the URL, and so the password.
		return nil, o, "malformed: in a user and a password each of / ? # @ : [ ] and % is written as %2F and the like"
	case u.Fragment != "" || u.Opaque != "":
		return nil, o, "want SCHEME://HOST:PORT"
	}
	plain, sentinel := *u, false
	plain.Scheme, sentinel = strings.CutSuffix(u.Scheme, "-sentinel")
	switch plain.Scheme {
	case "unix":
		if u.Path == "" || u.Host != "" || sentinel {
			return nil, o, "want unix:///PATH"
		}
	case "redis", "rediss", "valkey", "valkeys":
		if why := setting.BadAddress(u.Host, "6379"); why != "" {
			return nil, o, why
		}
	default:
		return nil, o, "want a scheme of redis, rediss (TLS), redis-sentinel, rediss-sentinel or unix"
	}
	if o, err = rueidis.ParseURL(plain.String()); err != nil { // what it quotes may be part of a password
		return nil, o, "want a number as the database, and skip_verify=true or false"
	}
	return u, o, badParameters(&plain, o, sentinel && first)
}

// badParameters returns what is wrong with path and query beyond what rueidis refuses, or "".
func badParameters(u *url.URL, o rueidis.ClientOption, needsMaster bool) string {
	q, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return "malformed parameters"
	}
	for name, values := range q {
		switch {
		case !slices.Contains(redisParameters, name):
			return "an unknown parameter: there are " + strings.Join(redisParameters, ", ")
		case len(values) > 1 && name != "addr":
			return name + " is there twice"
		}
	}
	switch protocol := q.Get("protocol"); {
	case o.SelectDB < 0, q.Has("db") && u.Scheme != "unix" && strings.Trim(u.Path, "/") != "":
		return "want one number as the database, 0 or more"
	case q.Has("skip_verify") && o.TLSConfig == nil:
		return "skip_verify is for rediss"
	case q.Has("protocol") && protocol != "2" && protocol != "3":
		return "want protocol=2 or 3"
	case q.Get("master_set") == "" && (needsMaster || q.Has("master_set")):
		return "want ?master_set=NAME"
	}
	for _, address := range q["addr"] {
		if _, _, err := net.SplitHostPort(address); err != nil {
			return "want addr=HOST:PORT"
		}
		if why := setting.BadAddress(address, "6379"); why != "" {
			return "addr: " + why
		}
	}
	return ""
}

// differs reports whether a further URL contradicts the first. It may leave out everything but
// the address: the settings of the first are for all.
func differs(first, o rueidis.ClientOption) bool {
	insecure := func(o rueidis.ClientOption) bool { return o.TLSConfig != nil && o.TLSConfig.InsecureSkipVerify }
	return o.Username+o.Password != "" && (o.Username != first.Username || o.Password != first.Password) ||
		o.SelectDB != 0 && o.SelectDB != first.SelectDB ||
		o.Sentinel.MasterSet != "" && o.Sentinel.MasterSet != first.Sentinel.MasterSet ||
		o.AlwaysRESP2 && !first.AlwaysRESP2 || insecure(o) && !insecure(first)
}
