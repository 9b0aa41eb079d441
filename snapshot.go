// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"cmp"
	"fmt"
	"net/netip"
	"net/url"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

// snapshot is what there is to see at one moment.
type snapshot struct {
	Stats    stats          `json:"stats"`
	Clients  clientList     `json:"clients"`
	Tunnels  tunnelList     `json:"tunnels"`
	Refusals []refusalInfo  `json:"refusals"`
	Settings []siteSettings `json:"settings"`
}

// stats count since the process has begun.
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

// histogram counts durations up to each bound of Buckets, and not up to the one
// before; the last count is of all longer ones.
type histogram struct {
	Buckets []float64 `json:"buckets"`
	Counts  []int64   `json:"counts"`
}

// clientList is a part of the clients, of which there are Total.
type clientList struct {
	Clients []clientInfo `json:"clients"`
	Total   int          `json:"total"`
}

// clientInfo is one bucket, or a client without one, whose bucket would be full.
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
	LastSeen     time.Time  `json:"last_seen,omitzero"` // zero: it never was
	BlockedUntil *time.Time `json:"blocked_until,omitempty"`
}

// tunnelList is a part of the open tunnels, of which there are Total.
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

// refusalInfo is an answer of the proxy's own.
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

// siteSettings are the options of one handler, in the words of the Caddyfile.
type siteSettings struct {
	Site     string    `json:"site"`
	Settings []setting `json:"settings"`
}

type setting struct {
	Option  string `json:"option"`
	Value   string `json:"value"`
	Default bool   `json:"default"`
}

// Of clients and tunnels a snapshot has the first of those that were active last.
const (
	snapshotClients = 100
	snapshotTunnels = 200
)

var (
	processStart = time.Now()
	configLoaded atomic.Pointer[time.Time] // when a config with a proxy has last begun to run
)

// takeSnapshot copies what there is to see. Requests do not wait for it.
func takeSnapshot(now time.Time) snapshot {
	s := snapshot{Stats: takeStats(now), Refusals: recent.list(), Settings: []siteSettings{}}
	s.Clients = findClients(clientQuery{limit: snapshotClients, key: sortsOfClients["last_seen"]}, now)
	s.Tunnels = findTunnels(tunnelQuery{limit: snapshotTunnels, key: sortsOfTunnels["idle"], ascending: true}, now)
	eachRegistry(func(r *registry) {
		r.handlers.Range(func(h *Handler, _ struct{}) bool {
			if h.running.Load() {
				s.Settings = append(s.Settings, siteSettings{strings.Join(h.addresses, " "), h.settings()})
			}
			return true
		})
	})
	slices.SortFunc(s.Settings, func(a, b siteSettings) int { return cmp.Compare(a.Site, b.Site) })
	return s
}

// eachRegistry calls f with the one registry, if there is one.
func eachRegistry(f func(*registry)) {
	registries.Range(func(_, r any) bool { f(r.(*registry)); return true })
}

func takeStats(now time.Time) stats {
	s := stats{Version: "(devel)", Time: now, Started: processStart, Loaded: processStart, Refusals: map[string]int64{}, Causes: map[string]int64{}}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, m := range append(info.Deps, &info.Main) {
			if m.Path == modulePath && m.Version != "" {
				s.Version = m.Version
			}
		}
	}
	s.Caddy, _ = caddy.Version()
	if loaded := configLoaded.Load(); loaded != nil {
		s.Loaded = *loaded
	}
	requests := func(k kind, o outcome) int64 { return int64(read(metrics.requests[k][o]).GetCounter().GetValue()) }
	s.Requests.Forwarded = requests(kindForward, outcomeOK)
	s.Requests.Tunnels = requests(kindTunnel, outcomeOK)
	s.Requests.PassedOn = requests(kindOther, outcomeOK)
	for k := range kinds {
		s.Requests.RateLimited += requests(k, outcomeLimited)
		s.Requests.Refused += requests(k, outcomeRefused)
		s.Requests.Failed += requests(k, outcomeFailed)
		s.Requests.AuthRequired += requests(k, outcomeAuthRequired)
	}
	for _, m := range readAll(metrics.refusals) {
		labels := map[string]string{}
		for _, label := range m.Label {
			labels[label.GetName()] = label.GetValue()
		}
		n := int64(m.GetCounter().GetValue())
		s.Refusals[labels["reason"]] += n
		if labels["cause"] != "" {
			s.Causes[labels["cause"]] += n
		}
	}
	s.Clients.Evicted = int64(read(metrics.evictions).GetCounter().GetValue())
	limiters.Range(func(_, l any) bool {
		s.Clients.Tracked += int64(l.(*limiter).clients())
		s.Clients.Limit += int64(l.(*limiter).key.maxClients)
		return true
	})
	eachRegistry(func(r *registry) {
		s.Tunnels.Open = int64(r.tunnels.Size())
		s.Tunnels.Limit = int64(r.limit())
		r.countBytes()
	})
	s.Tunnels.Opened = s.Requests.Tunnels
	s.Tunnels.BytesUp = int64(read(metrics.up).GetCounter().GetValue())
	s.Tunnels.BytesDown = int64(read(metrics.down).GetCounter().GetValue())
	s.BytesUp = s.Tunnels.BytesUp + int64(read(metrics.forwardedUp).GetCounter().GetValue())
	s.BytesDown = s.Tunnels.BytesDown + int64(read(metrics.forwardedDown).GetCounter().GetValue())
	for _, m := range readAll(metrics.dials) {
		if m.Label[0].GetValue() == "ok" {
			s.Dials.OK += int64(m.GetHistogram().GetSampleCount())
			s.DialSeconds = readHistogram(m)
		} else {
			s.Dials.Failed += int64(m.GetHistogram().GetSampleCount())
		}
	}
	s.FirstByteSeconds = readHistogram(read(metrics.responses))
	return s
}

const modulePath = "github.com/asyncproxy/caddy-async-proxy"

func read(m prometheus.Metric) *dto.Metric {
	var d dto.Metric
	_ = m.Write(&d) // fails only for metrics that are not valid
	return &d
}

func readAll(c prometheus.Collector) []*dto.Metric {
	ch := make(chan prometheus.Metric)
	go func() { c.Collect(ch); close(ch) }()
	var list []*dto.Metric
	for m := range ch {
		list = append(list, read(m))
	}
	return list
}

func readHistogram(m *dto.Metric) histogram {
	h := histogram{Buckets: []float64{}, Counts: []int64{}}
	var below uint64
	for _, b := range m.GetHistogram().GetBucket() {
		h.Buckets = append(h.Buckets, b.GetUpperBound())
		h.Counts = append(h.Counts, int64(b.GetCumulativeCount()-below))
		below = b.GetCumulativeCount()
	}
	h.Counts = append(h.Counts, int64(m.GetHistogram().GetSampleCount()-below))
	return h
}

// first finds the n values with the greatest keys, or, ascending, the least; of
// equal ones those that were added first.
type first[T any] struct {
	n         int
	ascending bool
	added     int
	list      []keyed[T] // once that many were added, the first n are sorted, and nothing after the last of them matters
}

type keyed[T any] struct {
	key   float64
	at    int
	value T
}

func (f *first[T]) compare(a, b keyed[T]) int {
	order := cmp.Compare(a.key, b.key)
	if !f.ascending {
		order = -order
	}
	return cmp.Or(order, cmp.Compare(a.at, b.at))
}

// add sorts once for each n values that matter, and takes little time for those
// that do not.
func (f *first[T]) add(key float64, value T) {
	f.added++
	k := keyed[T]{key, f.added, value}
	if f.added > 2*f.n && f.compare(k, f.list[f.n-1]) > 0 {
		return
	}
	f.list = append(f.list, k)
	if len(f.list) == 2*f.n {
		f.list = f.sorted(0)
	}
}

// sorted returns the values, in their order, but for some at the beginning.
func (f *first[T]) sorted(offset int) []keyed[T] {
	slices.SortFunc(f.list, f.compare)
	return f.list[min(offset, len(f.list)):min(f.n, len(f.list))]
}

// clientQuery says which clients are asked for.
type clientQuery struct {
	limit, offset int
	limited       bool   // only those that have no token, or are blocked
	match         string // a part of the name, in lower case; "" for all
	key           func(*client, int64) float64
	ascending     bool
}

// contains reports whether a name has a part, which is in lower case.
func contains(name, part string) bool {
	return part == "" || strings.Contains(strings.ToLower(name), part)
}

// client is a bucket and whose it is.
type client struct {
	*bucket
	limiter *limiter
	addr    netip.Addr
	tunnels int
	up      int64 // of tunnels that are open
	down    int64
	blocked int64 // since epoch; 0: not
	known   bool  // to a limiter
}

func (c *client) tokens(now int64) float64 {
	l := c.limiter
	return min(float64(l.key.burst), max(0, float64(now+l.fill-c.full.Load())/float64(l.interval)))
}

var sortsOfClients = map[string]func(c *client, now int64) float64{
	"last_seen":  func(c *client, _ int64) float64 { return float64(c.seen.Load()) },
	"requests":   func(c *client, _ int64) float64 { return float64(c.requests.Load()) },
	"rejections": func(c *client, _ int64) float64 { return float64(c.rejections.Load()) },
	"bytes": func(c *client, _ int64) float64 {
		return float64(c.bytesUp.Load() + c.bytesDown.Load() + c.up + c.down)
	},
	"tunnels": func(c *client, _ int64) float64 { return float64(c.tunnels) },
	"tokens":  func(c *client, now int64) float64 { return c.tokens(now) },
}

// findClients looks at all clients and returns those that are asked for: those
// that a limiter knows, and those that it does not, or not any more, but that
// are blocked or have tunnels open.
func findClients(q clientQuery, now time.Time) clientList {
	at := sinceEpoch(now)
	tunnels, blocks := tunnelsByClient(), blocksByClient(at)
	found := first[client]{n: q.offset + q.limit, ascending: q.ascending}
	total := 0
	add := func(c client) {
		if q.limited && c.blocked == 0 && c.tokens(at) >= 1 || q.match != "" && !contains(c.limiter.name(c.addr), q.match) {
			return
		}
		total++
		found.add(q.key(&c, at), c)
	}
	limiters.Range(func(_, value any) bool {
		l := value.(*limiter)
		l.each(func(addr netip.Addr, b *bucket) {
			c := client{addr: addr}
			if has := tunnels[clientKey{l, addr}]; has != nil {
				has.known = true
				c = *has
			}
			if block := blocks[addr]; block != nil {
				block.known = true
				c.blocked = block.blocked
			}
			c.bucket, c.limiter = b, l
			add(c)
		})
		return true
	})
	for key, c := range tunnels {
		if block := blocks[key.addr]; block != nil && !c.known {
			block.known = true
			c.blocked = block.blocked
		}
		if !c.known {
			add(*c)
		}
	}
	for _, c := range blocks {
		if c.known {
			continue
		}
		if c.limiter = limiterOf(c.addr); c.limiter != nil {
			add(*c)
		}
	}
	list := clientList{Clients: []clientInfo{}, Total: total}
	for _, k := range found.sorted(q.offset) {
		list.Clients = append(list.Clients, k.value.info(now))
	}
	return list
}

// clientKey is a client as one limiter knows it.
type clientKey struct {
	limiter *limiter
	addr    netip.Addr
}

// tunnelsByClient returns the clients that have tunnels open, each with what there is
// to say of it if its limiter does not know it.
func tunnelsByClient() map[clientKey]*client {
	clients, current := make(map[clientKey]*client), make(map[*limiter]*limiter)
	eachRegistry(func(r *registry) {
		r.tunnels.Range(func(_ uint64, t *tunnel) bool {
			l := current[t.owner.limiter]
			if l == nil {
				l = t.owner.limiter.successor()
				current[t.owner.limiter] = l
			}
			c := clients[clientKey{l, t.bucket}]
			if c == nil {
				c = &client{bucket: new(bucket), limiter: l, addr: t.bucket}
				clients[clientKey{l, t.bucket}] = c
			}
			c.tunnels++
			c.up += t.up.Load()
			c.down += t.down.Load()
			c.seen.Store(max(c.seen.Load(), sinceEpoch(t.start)))
			return true
		})
	})
	return clients
}

// successor returns the limiter that has taken the place of one of an earlier config:
// the only one of its zone to which the same clients are one. If there is none, or l is
// in use, that is l.
func (l *limiter) successor() *limiter {
	var same []*limiter
	inUse := false
	limiters.Range(func(_, value any) bool {
		other := value.(*limiter)
		inUse = inUse || other == l
		if other.key.zone == l.key.zone && other.key.v4 == l.key.v4 && other.key.v6 == l.key.v6 {
			same = append(same, other)
		}
		return true
	})
	if inUse || len(same) != 1 {
		return l
	}
	return same[0]
}

// blocksByClient returns those that are blocked, which they are in all zones.
func blocksByClient(at int64) map[netip.Addr]*client {
	clients := make(map[netip.Addr]*client)
	eachRegistry(func(r *registry) {
		r.blocks.Range(func(addr netip.Addr, until int64) bool {
			if until > at {
				clients[addr] = &client{bucket: new(bucket), addr: addr, blocked: until}
			}
			return true
		})
	})
	return clients
}

// limiterOf returns a limiter to which addr is a client, or nil: of those the
// one with the largest networks, as to it addr is as large as that.
func limiterOf(addr netip.Addr) *limiter {
	var best *limiter
	order := func(a, b *limiter) int {
		return cmp.Or(cmp.Compare(a.key.bits(addr), b.key.bits(addr)), cmp.Compare(a.key.zone, b.key.zone),
			cmp.Compare(a.key.burst, b.key.burst), cmp.Compare(a.key.refill, b.key.refill))
	}
	limiters.Range(func(_, value any) bool {
		if l := value.(*limiter); l.keyOf(addr) == addr && (best == nil || order(l, best) < 0) {
			best = l
		}
		return true
	})
	return best
}

func (c *client) info(now time.Time) clientInfo {
	at := sinceEpoch(now)
	info := clientInfo{
		Client: printable(c.limiter.name(c.addr)), Zone: c.limiter.key.zone,
		Tokens: c.tokens(at), Burst: c.limiter.key.burst, Refill: c.limiter.key.refill,
		Requests: c.requests.Load(), Rejections: c.rejections.Load(),
		BytesUp: c.bytesUp.Load() + c.up, BytesDown: c.bytesDown.Load() + c.down,
		Tunnels: int64(c.tunnels),
	}
	if seen := c.seen.Load(); seen > 0 {
		info.LastSeen = now.Add(time.Duration(seen - at))
	}
	if c.blocked > 0 {
		until := now.Add(time.Duration(c.blocked - at))
		info.BlockedUntil = &until
	}
	return info
}

// each calls f with every bucket.
func (l *limiter) each(f func(netip.Addr, *bucket)) {
	g := l.gens.Load()
	g.cur.Range(func(addr netip.Addr, b *bucket) bool { f(addr, b); return true })
	g.old.Range(func(addr netip.Addr, b *bucket) bool {
		if _, promoted := g.cur.Load(addr); !promoted {
			f(addr, b)
		}
		return true
	})
}

// name is how a client is shown: an address, a network where several share
// a bucket, or a user.
func (l *limiter) name(addr netip.Addr) string {
	if addr.Zone() != "" {
		return "user " + addr.Zone()
	}
	name := clientName(addr)
	if bits := l.key.bits(addr); addr.IsValid() && bits < addr.BitLen() {
		name += "/" + strconv.Itoa(bits)
	}
	return name
}

// tunnelQuery says which tunnels are asked for.
type tunnelQuery struct {
	limit, offset int
	match         string // a part of the client, user or target, in lower case
	key           func(*tunnel, int64) float64
	ascending     bool
}

var sortsOfTunnels = map[string]func(t *tunnel, now int64) float64{
	"started": func(t *tunnel, _ int64) float64 { return float64(t.id) },
	"idle":    func(t *tunnel, now int64) float64 { return float64(now - t.active.Load()) },
	"bytes":   func(t *tunnel, _ int64) float64 { return float64(t.up.Load() + t.down.Load()) },
}

// findTunnels looks at all tunnels and returns those that are asked for.
func findTunnels(q tunnelQuery, now time.Time) tunnelList {
	at := sinceEpoch(now)
	found := first[*tunnel]{n: q.offset + q.limit, ascending: q.ascending}
	list := tunnelList{Tunnels: []tunnelInfo{}}
	eachRegistry(func(r *registry) {
		r.tunnels.Range(func(_ uint64, t *tunnel) bool {
			if contains(clientName(t.client), q.match) || contains(t.user, q.match) || contains(t.target, q.match) {
				list.Total++
				found.add(q.key(t, at), t)
			}
			return true
		})
	})
	for _, k := range found.sorted(q.offset) {
		t := k.value
		list.Tunnels = append(list.Tunnels, tunnelInfo{
			ID: t.id, Client: clientName(t.client), User: printable(t.user), Target: printable(t.target), Address: t.address.String(), Proto: printable(t.proto),
			Started: t.start, IdleSeconds: time.Duration(max(0, at-t.active.Load())).Seconds(), BytesUp: t.up.Load(), BytesDown: t.down.Load(),
		})
	}
	return list
}

// What a query may ask for: maxPage clients or tunnels in one answer, after at
// most maxOffset others. To find them, limit+offset of them are kept.
const (
	maxPage   = 1000
	maxOffset = 10_000
)

// querying is held while a query looks at all clients or tunnels, so that many
// queries at once cost no more memory than one.
var querying sync.Mutex

// queryClients reads a query as of the admin API, and answers it.
func queryClients(values url.Values, now time.Time) (clientList, error) {
	q := clientQuery{limited: values.Has("limited") && values.Get("limited") != "false", match: strings.ToLower(values.Get("q"))}
	var err error
	if q.limit, q.offset, q.ascending, err = queryPage(values); err != nil {
		return clientList{}, err
	}
	if q.key = sortsOfClients[cmp.Or(values.Get("sort"), "last_seen")]; q.key == nil {
		return clientList{}, fmt.Errorf("sort %q: expected last_seen, requests, rejections, bytes, tunnels or tokens", values.Get("sort"))
	}
	querying.Lock()
	defer querying.Unlock()
	return findClients(q, now), nil
}

// queryTunnels is queryClients for tunnels.
func queryTunnels(values url.Values, now time.Time) (tunnelList, error) {
	q := tunnelQuery{match: strings.ToLower(values.Get("q"))}
	var err error
	if q.limit, q.offset, q.ascending, err = queryPage(values); err != nil {
		return tunnelList{}, err
	}
	if q.key = sortsOfTunnels[cmp.Or(values.Get("sort"), "started")]; q.key == nil {
		return tunnelList{}, fmt.Errorf("sort %q: expected started, idle or bytes", values.Get("sort"))
	}
	querying.Lock()
	defer querying.Unlock()
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

// recent are the last refusals of the process.
var recent refusalRing

// refusalRing keeps the last refusals. Its methods are safe for concurrent use,
// and wait for nobody.
type refusalRing struct {
	last [100]atomic.Pointer[refusalInfo]
	n    atomic.Uint64
}

func (r *refusalRing) add(info *refusalInfo) {
	r.last[(r.n.Add(1)-1)%uint64(len(r.last))].Store(info)
}

// list returns the refusals, the latest first.
func (r *refusalRing) list() []refusalInfo {
	list := make([]refusalInfo, 0, len(r.last))
	n := r.n.Load()
	for i := range min(n, uint64(len(r.last))) {
		if info := r.last[(n-1-i)%uint64(len(r.last))].Load(); info != nil {
			list = append(list, *info)
		}
	}
	return list
}

// addRecent adds a refusal to the list that the status page shows.
func (v *visit) addRecent(f *refusal) {
	recent.add(&refusalInfo{
		Time: v.start, Client: clientName(v.addr), Method: printable(v.r.Method), Target: printable(v.r.Host),
		Status: f.status, Reason: f.kind, Cause: string(v.cause), Detail: printable(f.text),
	})
}
