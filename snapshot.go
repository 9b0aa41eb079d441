// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"cmp"
	"fmt"
	"net/url"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/asyncproxy/caddy-async-proxy/internal/bucket"
	"github.com/asyncproxy/caddy-async-proxy/internal/client"
	"github.com/asyncproxy/caddy-async-proxy/internal/metrics"
	"github.com/asyncproxy/caddy-async-proxy/internal/monotime"
	"github.com/asyncproxy/caddy-async-proxy/internal/printable"
	"github.com/asyncproxy/caddy-async-proxy/internal/tunnel"
)

// snapshot is the state of the process at one moment, as the status page shows it.
type snapshot struct {
	Stats    stats          `json:"stats"`
	Clients  clientList     `json:"clients"`
	Tunnels  tunnelList     `json:"tunnels"`
	Refusals []refusalInfo  `json:"refusals"`
	Settings []siteSettings `json:"settings"`
}

// stats are the counters since the process started.
type stats struct {
	Version  string    `json:"version"`
	Caddy    string    `json:"caddy"`
	Started  time.Time `json:"started"`
	Loaded   time.Time `json:"loaded"`
	Time     time.Time `json:"time"`
	Requests struct {
		Forwarded   int64 `json:"forwarded"`
		Tunnels     int64 `json:"tunnels"`
		PassedOn    int64 `json:"passed_on"`
		RateLimited int64 `json:"rate_limited"`
		Refused     int64 `json:"refused"`
		Failed      int64 `json:"failed"`

		AuthRequired int64 `json:"auth_required"`
	} `json:"requests"`
	Refusals map[string]int64 `json:"refusals"`
	Causes   map[string]int64 `json:"causes"`
	Clients  struct {
		Tracked int64 `json:"tracked"`
		Limit   int64 `json:"limit"`
		Evicted int64 `json:"evicted"`
	} `json:"clients"`
	Tunnels struct {
		Open      int64 `json:"open"`
		Limit     int64 `json:"limit"`
		Opened    int64 `json:"opened"`
		BytesUp   int64 `json:"bytes_up"`
		BytesDown int64 `json:"bytes_down"`
	} `json:"tunnels"`
	BytesUp   int64 `json:"bytes_up"`
	BytesDown int64 `json:"bytes_down"`
	Dials     struct {
		OK     int64 `json:"ok"`
		Failed int64 `json:"failed"`
	} `json:"dials"`
	DialSeconds      histogram `json:"dial_seconds"`
	FirstByteSeconds histogram `json:"first_byte_seconds"`
}

// histogram counts durations per bucket, not cumulatively: above the previous bound of
// Buckets and up to this one. The last count is that of all longer durations.
type histogram struct {
	Buckets []float64 `json:"buckets"`
	Counts  []int64   `json:"counts"`
}

// clientList is one page of the clients; Total counts them all.
type clientList struct {
	Clients []clientInfo `json:"clients"`
	Total   int          `json:"total"`
}

// clientInfo describes one bucket, or a client without one, which counts as full.
type clientInfo struct {
	Client       string     `json:"client"`
	Zone         string     `json:"zone"`
	Tokens       float64    `json:"tokens"`
	Burst        int64      `json:"burst"`
	Refill       float64    `json:"refill"`
	Requests     int64      `json:"requests"`
	Rejections   int64      `json:"rejections"`
	BytesUp      int64      `json:"bytes_up"`
	BytesDown    int64      `json:"bytes_down"`
	Tunnels      int64      `json:"tunnels"`
	LastSeen     time.Time  `json:"last_seen,omitzero"` // zero: never
	BlockedUntil *time.Time `json:"blocked_until,omitempty"`
}

// tunnelList is one page of the open tunnels; Total counts them all.
type tunnelList struct {
	Tunnels []tunnelInfo `json:"tunnels"`
	Total   int          `json:"total"`
}

type tunnelInfo struct {
	ID          uint64    `json:"id"`
	Client      string    `json:"client"`
	User        string    `json:"user,omitempty"`
	Target      string    `json:"target"`
	Address     string    `json:"address"`
	Proto       string    `json:"proto"`
	Started     time.Time `json:"started"`
	IdleSeconds float64   `json:"idle_seconds"`
	BytesUp     int64     `json:"bytes_up"`
	BytesDown   int64     `json:"bytes_down"`
}

// refusalInfo describes a response that the proxy generated itself.
type refusalInfo struct {
	Time   time.Time `json:"time"`
	Client string    `json:"client"`
	Method string    `json:"method"`
	Target string    `json:"target"`
	Status int       `json:"status"`
	Reason string    `json:"reason"`
	Cause  string    `json:"cause,omitempty"`
	Detail string    `json:"detail"`
}

// siteSettings holds the options of one handler, named as in the Caddyfile.
type siteSettings struct {
	Site     string    `json:"site"`
	Settings []setting `json:"settings"`
}

type setting struct {
	Option  string `json:"option"`
	Value   string `json:"value"`
	Default bool   `json:"default"`
}

// The number of most recently active clients and tunnels in a snapshot.
const (
	snapshotClients = 100
	snapshotTunnels = 200
)

// takeSnapshot copies the current state. It does not block requests.
func takeSnapshot(now time.Time) snapshot {
	s := snapshot{Stats: takeStats(now), Refusals: recentRefusals.list(), Settings: []siteSettings{}}
	s.Clients = findClients(clientQuery{limit: snapshotClients, key: sortsOfClients["last_seen"]}, now)
	s.Tunnels = findTunnels(tunnelQuery{limit: snapshotTunnels, key: sortsOfTunnels["idle"], ascending: true}, now)
	withProcess(func(p *process) {
		for h := range p.handlers.All() {
			if h.running.Load() {
				s.Settings = append(s.Settings, siteSettings{strings.Join(h.site.addresses, " "), h.settings()})
			}
		}
	})
	slices.SortFunc(s.Settings, func(a, b siteSettings) int { return cmp.Compare(a.Site, b.Site) })
	return s
}

func takeStats(now time.Time) stats {
	s := stats{Version: moduleVersion(), Time: now, Started: program.started, Loaded: program.started}
	s.Caddy, _ = caddy.Version()
	if loaded := program.loaded.Load(); loaded != nil {
		s.Loaded = *loaded
	}
	limiters.Range(func(_, value any) bool {
		t := value.(*bucket.Table)
		s.Clients.Tracked += int64(t.Len())
		s.Clients.Limit += int64(t.Limits.MaxClients)
		return true
	})
	withProcess(func(p *process) {
		s.Tunnels.Open = int64(p.tunnels.Size())
		s.Tunnels.Limit = int64(p.tunnelLimit())
		p.countTunnelBytes()
	})
	s.count(program.metrics.Read())
	return s
}

// count sets what the counters have counted.
func (s *stats) count(r metrics.Reading) {
	s.Requests.Forwarded = r.Requests[metrics.Forward][metrics.OK]
	s.Requests.Tunnels = r.Requests[metrics.Tunnel][metrics.OK]
	s.Requests.PassedOn = r.Requests[metrics.Other][metrics.OK]
	for _, outcomes := range r.Requests {
		s.Requests.RateLimited += outcomes[metrics.RateLimited]
		s.Requests.Refused += outcomes[metrics.Refused]
		s.Requests.Failed += outcomes[metrics.Failed]
		s.Requests.AuthRequired += outcomes[metrics.AuthRequired]
	}
	s.Refusals, s.Causes = r.Refusals, r.Causes
	s.Clients.Evicted = r.Evictions
	s.Tunnels.Opened = s.Requests.Tunnels
	s.Tunnels.BytesUp, s.Tunnels.BytesDown = r.TunnelBytesUp, r.TunnelBytesDown
	s.BytesUp, s.BytesDown = r.TunnelBytesUp+r.ForwardedBytesUp, r.TunnelBytesDown+r.ForwardedBytesDown
	s.Dials.OK, s.Dials.Failed = r.DialsOK, r.DialsFailed
	s.DialSeconds, s.FirstByteSeconds = histogram(r.DialSeconds), histogram(r.ResponseSeconds)
}

const modulePath = "github.com/asyncproxy/caddy-async-proxy"

// moduleVersion returns the version of this module in the running binary.
func moduleVersion() string {
	version := "(devel)"
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, m := range append(info.Deps, &info.Main) {
			if m.Path == modulePath && m.Version != "" {
				version = m.Version
			}
		}
	}
	return version
}

// topN finds the n values with the largest keys or, if ascending, the smallest. Among equal
// keys, earlier values win.
type topN[T any] struct {
	n         int
	ascending bool
	added     int
	list      []topEntry[T] // up to 2n candidates; after a compaction, the first n are the best so far, in order
}

type topEntry[T any] struct {
	key   float64
	seq   int
	value T
}

func (f *topN[T]) compare(a, b topEntry[T]) int {
	order := cmp.Compare(a.key, b.key)
	if !f.ascending {
		order = -order
	}
	return cmp.Or(order, cmp.Compare(a.seq, b.seq))
}

// add sorts once per n relevant values. It discards irrelevant ones after one comparison.
func (f *topN[T]) add(key float64, value T) {
	f.added++
	k := topEntry[T]{key, f.added, value}
	if f.added > 2*f.n && f.compare(k, f.list[f.n-1]) > 0 {
		return
	}
	f.list = append(f.list, k)
	if len(f.list) == 2*f.n {
		f.list = f.sorted(0)
	}
}

// sorted returns the best n values in order, without the first offset.
func (f *topN[T]) sorted(offset int) []topEntry[T] {
	slices.SortFunc(f.list, f.compare)
	return f.list[min(offset, len(f.list)):min(f.n, len(f.list))]
}

// clientQuery selects clients.
type clientQuery struct {
	limit, offset int
	limited       bool   // only clients without a token or that are blocked
	match         string // substring of the name, in lower case; "" for all
	key           func(*clientRow, int64) float64
	ascending     bool
}

// containsFold reports whether a name contains part, ignoring case. part must be lower case.
func containsFold(name, part string) bool {
	return part == "" || strings.Contains(strings.ToLower(name), part)
}

// clientRow is the state of a client.
type clientRow struct {
	*bucket.Entry
	table   *bucket.Table
	client  client.Key
	tunnels int
	started int64 // when its last tunnel did, if no limiter tracks it; else 0
	up      int64 // bytes of open tunnels
	down    int64
	blocked int64 // since epoch; 0: not
	listed  bool  // a limiter tracks it, so it is already listed
}

func (c *clientRow) tokens(now int64) float64 { return c.table.Tokens(c.Entry, now) }

func (c *clientRow) lastSeen() int64 { return max(c.LastSeen(), c.started) }

// bytes returns the client's bytes, those of open tunnels included.
func (c *clientRow) bytes() (up, down int64) {
	up, down = c.Bytes()
	return up + c.up, down + c.down
}

// The keys of sortsOfClients and sortsOfTunnels, for messages.
const (
	namesOfClientSorts = "last_seen, requests, rejections, bytes, tunnels or tokens"
	namesOfTunnelSorts = "started, idle or bytes"
)

var sortsOfClients = map[string]func(c *clientRow, now int64) float64{
	"last_seen":  func(c *clientRow, _ int64) float64 { return float64(c.lastSeen()) },
	"requests":   func(c *clientRow, _ int64) float64 { return float64(c.Requests()) },
	"rejections": func(c *clientRow, _ int64) float64 { return float64(c.Rejections()) },
	"bytes": func(c *clientRow, _ int64) float64 {
		up, down := c.bytes()
		return float64(up + down)
	},
	"tunnels": func(c *clientRow, _ int64) float64 { return float64(c.tunnels) },
	"tokens":  func(c *clientRow, now int64) float64 { return c.tokens(now) },
}

// findClients returns the clients that q selects. It searches the clients that a limiter
// tracks, and also untracked ones that are blocked or have open tunnels.
func findClients(q clientQuery, now time.Time) clientList {
	at := monotime.Of(now)
	tunnels, blocks := tunnelsByClient(), blocksByClient(at)
	found := topN[clientRow]{n: q.offset + q.limit, ascending: q.ascending}
	total := 0
	add := func(c clientRow) {
		if q.limited && c.blocked == 0 && c.tokens(at) >= 1 || q.match != "" && !containsFold(c.table.Name(c.client), q.match) {
			return
		}
		total++
		found.add(q.key(&c, at), c)
	}
	limiters.Range(func(_, value any) bool {
		t := value.(*bucket.Table)
		t.Each(func(key client.Key, e *bucket.Entry) {
			c := clientRow{client: key}
			if open := tunnels[clientKey{t, key}]; open != nil {
				open.listed = true
				c = *open
			}
			if block := blocks[key]; block != nil {
				block.listed = true
				c.blocked = block.blocked
			}
			c.Entry, c.table, c.started = e, t, 0
			add(c)
		})
		return true
	})
	for key, c := range tunnels {
		if block := blocks[key.client]; block != nil && !c.listed {
			block.listed = true
			c.blocked = block.blocked
		}
		if !c.listed {
			add(*c)
		}
	}
	for _, c := range blocks {
		if c.listed {
			continue
		}
		if c.table = tableOf(c.client); c.table != nil {
			add(*c)
		}
	}
	list := clientList{Clients: []clientInfo{}, Total: total}
	for _, k := range found.sorted(q.offset) {
		list.Clients = append(list.Clients, k.value.info(now))
	}
	return list
}

// clientKey identifies a client of one limiter.
type clientKey struct {
	table  *bucket.Table
	client client.Key
}

// tunnelsByClient returns the clients with open tunnels. Each entry is complete enough to be
// listed even if its limiter does not track the client.
func tunnelsByClient() map[clientKey]*clientRow {
	clients, current := make(map[clientKey]*clientRow), make(map[*bucket.Table]*bucket.Table)
	withProcess(func(p *process) {
		for t := range p.tunnels.All() {
			opener := openedBy(t)
			table := current[opener.limiter]
			if table == nil {
				table = replacement(opener.limiter)
				current[opener.limiter] = table
			}
			c := clients[clientKey{table, t.LimitKey}]
			if c == nil {
				c = &clientRow{Entry: new(bucket.Entry), table: table, client: t.LimitKey}
				clients[clientKey{table, t.LimitKey}] = c
			}
			c.tunnels++
			c.up += t.BytesUp()
			c.down += t.BytesDown()
			c.started = max(c.started, monotime.Of(t.Start))
		}
	})
	return clients
}

// replacement returns the table that replaced t after a reload: the only one with the same
// zone and prefix lengths. It returns t if t is still in use or there is no such table.
func replacement(t *bucket.Table) *bucket.Table {
	var candidates []*bucket.Table
	inUse := false
	limiters.Range(func(_, value any) bool {
		candidate := value.(*bucket.Table)
		inUse = inUse || candidate == t
		a, b := candidate.Limits, t.Limits
		if a.Zone == b.Zone && a.IPv4Prefix == b.IPv4Prefix && a.IPv6Prefix == b.IPv6Prefix {
			candidates = append(candidates, candidate)
		}
		return true
	})
	if inUse || len(candidates) != 1 {
		return t
	}
	return candidates[0]
}

// blocksByClient returns the blocked clients. Blocks apply in all zones.
func blocksByClient(at int64) map[client.Key]*clientRow {
	clients := make(map[client.Key]*clientRow)
	withProcess(func(p *process) {
		for key, until := range p.blocks.All() {
			if until > at {
				clients[key] = &clientRow{Entry: new(bucket.Entry), client: key, blocked: until}
			}
		}
	})
	return clients
}

// tableOf returns the table of a limiter for which key is the key of a client, or nil. Among several
// it prefers the shortest prefix, so that key is shown as the largest network.
func tableOf(key client.Key) *bucket.Table {
	var best *bucket.Table
	order := func(a, b *bucket.Table) int {
		return cmp.Or(cmp.Compare(a.Bits(key), b.Bits(key)), cmp.Compare(a.Limits.Zone, b.Limits.Zone),
			cmp.Compare(a.Limits.Burst, b.Limits.Burst), cmp.Compare(a.Limits.Refill, b.Limits.Refill))
	}
	limiters.Range(func(_, value any) bool {
		if t := value.(*bucket.Table); t.KeyOf(key) == key && (best == nil || order(t, best) < 0) {
			best = t
		}
		return true
	})
	return best
}

func (c *clientRow) info(now time.Time) clientInfo {
	at := monotime.Of(now)
	info := clientInfo{
		Client: printable.Text(c.table.Name(c.client)), Zone: c.table.Limits.Zone,
		Tokens: c.tokens(at), Burst: c.table.Limits.Burst, Refill: c.table.Limits.Refill,
		Requests: c.Requests(), Rejections: c.Rejections(),
		Tunnels: int64(c.tunnels),
	}
	info.BytesUp, info.BytesDown = c.bytes()
	if seen := c.lastSeen(); seen > 0 {
		info.LastSeen = now.Add(time.Duration(seen - at))
	}
	if c.blocked > 0 {
		until := now.Add(time.Duration(c.blocked - at))
		info.BlockedUntil = &until
	}
	return info
}

// tunnelQuery selects tunnels.
type tunnelQuery struct {
	limit, offset int
	match         string // substring of the client, user or target, in lower case
	client        string // substring of the client or user, in lower case
	key           func(*tunnel.Tunnel, int64) float64
	ascending     bool
}

var sortsOfTunnels = map[string]func(t *tunnel.Tunnel, now int64) float64{
	"started": func(t *tunnel.Tunnel, _ int64) float64 { return float64(t.ID) },
	"idle":    func(t *tunnel.Tunnel, now int64) float64 { return float64(now - t.LastActivity()) },
	"bytes":   func(t *tunnel.Tunnel, _ int64) float64 { return float64(t.BytesUp() + t.BytesDown()) },
}

// isClientOf reports whether part, in lower case, is a part of the name of t's client: of its
// address, of its user, or of the owner of its bucket.
func isClientOf(t *tunnel.Tunnel, part string) bool {
	return containsFold(client.Name(t.Client), part) || containsFold(t.User, part) || containsFold(t.LimitKey.String(), part)
}

// findTunnels returns the open tunnels that q selects.
func findTunnels(q tunnelQuery, now time.Time) tunnelList {
	at := monotime.Of(now)
	found := topN[*tunnel.Tunnel]{n: q.offset + q.limit, ascending: q.ascending}
	list := tunnelList{Tunnels: []tunnelInfo{}}
	withProcess(func(p *process) {
		for t := range p.tunnels.All() {
			if (isClientOf(t, q.match) || containsFold(t.Target, q.match)) && isClientOf(t, q.client) {
				list.Total++
				found.add(q.key(t, at), t)
			}
		}
	})
	for _, k := range found.sorted(q.offset) {
		t := k.value
		list.Tunnels = append(list.Tunnels, tunnelInfo{
			ID: t.ID, Client: client.Name(t.Client), User: printable.Text(t.User), Target: printable.Text(t.Target), Address: t.Address.String(), Proto: printable.Text(t.Proto),
			Started: t.Start, IdleSeconds: time.Duration(max(0, at-t.LastActivity())).Seconds(), BytesUp: t.BytesUp(), BytesDown: t.BytesDown(),
		})
	}
	return list
}

// The limits of a query: at most maxPage clients or tunnels in one response, after skipping
// at most maxOffset. The search holds limit+offset candidates in memory.
const (
	maxPage   = 1000
	maxOffset = 10_000
)

// queryMutex is held while a query searches all clients or tunnels, so that concurrent queries
// need no more memory than one.
var queryMutex sync.Mutex

// queryClients parses a query of the admin API and returns its result.
func queryClients(values url.Values, now time.Time) (clientList, error) {
	q := clientQuery{limited: values.Has("limited") && values.Get("limited") != "false", match: strings.ToLower(values.Get("q"))}
	var err error
	if q.limit, q.offset, q.ascending, err = queryPage(values); err != nil {
		return clientList{}, err
	}
	if q.key = sortsOfClients[cmp.Or(values.Get("sort"), "last_seen")]; q.key == nil {
		return clientList{}, fmt.Errorf("sort %q: expected %s", values.Get("sort"), namesOfClientSorts)
	}
	queryMutex.Lock()
	defer queryMutex.Unlock()
	return findClients(q, now), nil
}

// queryTunnels does the same for tunnels.
func queryTunnels(values url.Values, now time.Time) (tunnelList, error) {
	q := tunnelQuery{match: strings.ToLower(values.Get("q")), client: strings.ToLower(values.Get("client"))}
	var err error
	if q.limit, q.offset, q.ascending, err = queryPage(values); err != nil {
		return tunnelList{}, err
	}
	if q.key = sortsOfTunnels[cmp.Or(values.Get("sort"), "started")]; q.key == nil {
		return tunnelList{}, fmt.Errorf("sort %q: expected %s", values.Get("sort"), namesOfTunnelSorts)
	}
	queryMutex.Lock()
	defer queryMutex.Unlock()
	return findTunnels(q, now), nil
}

func queryPage(values url.Values) (limit, offset int, ascending bool, err error) {
	var ok bool
	if limit, ok = parseInt(cmp.Or(values.Get("limit"), "100"), 1, maxPage); !ok {
		return 0, 0, false, fmt.Errorf("limit %q: expected a number from 1 to %d", values.Get("limit"), maxPage)
	}
	if offset, ok = parseInt(cmp.Or(values.Get("offset"), "0"), 0, maxOffset); !ok {
		return 0, 0, false, fmt.Errorf("offset %q: expected a number from 0 to %d", values.Get("offset"), maxOffset)
	}
	switch order := values.Get("order"); order {
	case "", "desc":
	case "asc":
		ascending = true
	default:
		return 0, 0, false, fmt.Errorf("order %q: expected asc or desc", order)
	}
	return limit, offset, ascending, nil
}

// recentRefusals holds the latest refusals of the process.
var recentRefusals refusalRing

// refusalRing holds the latest refusals. Its methods are safe for concurrent use and
// lock-free.
type refusalRing struct {
	entries [100]atomic.Pointer[refusalInfo]
	n       atomic.Uint64
}

func (r *refusalRing) add(info *refusalInfo) {
	r.entries[(r.n.Add(1)-1)%uint64(len(r.entries))].Store(info)
}

// list returns the refusals, latest first.
func (r *refusalRing) list() []refusalInfo {
	list := make([]refusalInfo, 0, len(r.entries))
	n := r.n.Load()
	for i := range min(n, uint64(len(r.entries))) {
		if info := r.entries[(n-1-i)%uint64(len(r.entries))].Load(); info != nil {
			list = append(list, *info)
		}
	}
	return list
}

// addRecent adds a refusal to the list that the status page shows.
func (v *transaction) addRecent(f *refusal) {
	recentRefusals.add(&refusalInfo{
		Time: v.start, Client: client.Name(v.addr), Method: printable.Text(v.r.Method), Target: printable.Text(v.r.Host),
		Status: f.status, Reason: f.errorType, Cause: string(v.cause), Detail: printable.Text(f.text),
	})
}
