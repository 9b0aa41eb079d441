// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"cmp"
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"net/url"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
)

// This file stands in for snapshot.go until that is there: the types of the
// contract, and data that are partly real (tunnels, buckets) or, with
// ASYNC_PROXY_DEMO set, made up. It goes away with the merge.

type snapshot struct {
	Stats    stats          `json:"stats"`
	Clients  clientList     `json:"clients"`
	Tunnels  tunnelList     `json:"tunnels"`
	Refusals []refusalInfo  `json:"refusals"`
	Settings []siteSettings `json:"settings"`
}

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
	} `json:"requests"`
	Refusals map[string]int64 `json:"refusals"`
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

type histogram struct {
	Buckets []float64 `json:"buckets"`
	Counts  []int64   `json:"counts"`
}

type clientList struct {
	Clients []clientInfo `json:"clients"`
	Total   int          `json:"total"`
}

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
	LastSeen     time.Time  `json:"last_seen"`
	BlockedUntil *time.Time `json:"blocked_until,omitempty"`
}

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

type refusalInfo struct {
	Time   time.Time `json:"time"`
	Client string    `json:"client"`
	Method string    `json:"method"`
	Target string    `json:"target"`
	Status int       `json:"status"`
	Reason string    `json:"reason"`
	Detail string    `json:"detail"`
}

type siteSettings struct {
	Site     string    `json:"site"`
	Settings []setting `json:"settings"`
}

type setting struct {
	Option  string `json:"option"`
	Value   string `json:"value"`
	Default bool   `json:"default"`
}

// takeSnapshot copies what there is to see.
func takeSnapshot(now time.Time) snapshot {
	s := stubSnapshot(now)
	s.Clients.Total, s.Tunnels.Total = len(s.Clients.Clients), len(s.Tunnels.Tunnels)
	slices.SortFunc(s.Clients.Clients, func(a, b clientInfo) int { return b.LastSeen.Compare(a.LastSeen) })
	s.Clients.Clients = s.Clients.Clients[:min(100, len(s.Clients.Clients))]
	s.Tunnels.Tunnels = s.Tunnels.Tunnels[:min(200, len(s.Tunnels.Tunnels))]
	return s
}

// queryClients is what GET /async_proxy/clients answers.
func queryClients(q url.Values, now time.Time) (clientList, error) {
	all := stubSnapshot(now).Clients.Clients
	all = slices.DeleteFunc(all, func(c clientInfo) bool {
		return q.Has("limited") && c.Tokens >= 1 && c.BlockedUntil == nil || !strings.Contains(c.Client, q.Get("q"))
	})
	key := map[string]func(c clientInfo) float64{
		"last_seen":  func(c clientInfo) float64 { return float64(c.LastSeen.UnixNano()) },
		"requests":   func(c clientInfo) float64 { return float64(c.Requests) },
		"rejections": func(c clientInfo) float64 { return float64(c.Rejections) },
		"bytes":      func(c clientInfo) float64 { return float64(c.BytesUp + c.BytesDown) },
		"tunnels":    func(c clientInfo) float64 { return float64(c.Tunnels) },
		"tokens":     func(c clientInfo) float64 { return c.Tokens },
	}[cmp.Or(q.Get("sort"), "last_seen")]
	if key == nil {
		return clientList{}, fmt.Errorf("sort %q: expected last_seen, requests, rejections, bytes, tunnels or tokens", q.Get("sort"))
	}
	slices.SortFunc(all, func(a, b clientInfo) int {
		if q.Get("order") == "asc" {
			a, b = b, a
		}
		return cmp.Compare(key(b), key(a))
	})
	limit, _ := strconv.Atoi(cmp.Or(q.Get("limit"), "100"))
	return clientList{all[:min(limit, len(all))], len(all)}, nil
}

// queryTunnels is what GET /async_proxy/tunnels answers.
func queryTunnels(q url.Values, now time.Time) (tunnelList, error) {
	all := stubSnapshot(now).Tunnels.Tunnels
	all = slices.DeleteFunc(all, func(t tunnelInfo) bool {
		return !strings.Contains(t.Client, q.Get("q")) && !strings.Contains(t.Target, q.Get("q"))
	})
	limit, _ := strconv.Atoi(cmp.Or(q.Get("limit"), "100"))
	return tunnelList{all[:min(limit, len(all))], len(all)}, nil
}

func closeTunnel(id uint64) bool {
	if demo.on {
		demo.Lock()
		defer demo.Unlock()
		n := len(demo.tunnels)
		demo.tunnels = slices.DeleteFunc(demo.tunnels, func(t tunnelInfo) bool { return t.ID == id })
		return len(demo.tunnels) < n
	}
	r, err := acquireRegistry()
	if err != nil {
		return false
	}
	defer func() { _ = releaseRegistry() }()
	t, ok := r.tunnels.Load(id)
	if ok {
		t.close("operator")
	}
	return ok
}

func refillClient(addr netip.Addr) (done bool) {
	limiters.Range(func(_, v any) bool {
		l := v.(*limiter)
		if b, ok := l.gens.Load().cur.Load(l.client(addr)); ok {
			b.full.Store(0)
			done = true
		}
		return true
	})
	demo.Lock()
	defer demo.Unlock()
	for i := range demo.clients {
		if c := &demo.clients[i]; strings.TrimSuffix(c.Client, "/64") == addr.String() {
			c.Tokens, c.BlockedUntil, done = float64(c.Burst), nil, true
		}
	}
	return done
}

func blockClient(addr netip.Addr, d time.Duration) bool {
	demo.Lock()
	defer demo.Unlock()
	demo.blocked[addr] = time.Now().Add(d)
	return true
}

var demo = struct {
	sync.Mutex
	on       bool
	last     time.Time
	stats    stats
	clients  []clientInfo
	tunnels  []tunnelInfo
	refusals []refusalInfo
	blocked  map[netip.Addr]time.Time
	id       uint64
}{blocked: map[netip.Addr]time.Time{}, on: os.Getenv("ASYNC_PROXY_DEMO") != ""}

var processStart = time.Now()

func stubSnapshot(now time.Time) snapshot {
	demo.Lock()
	defer demo.Unlock()
	var s snapshot
	if demo.on {
		s = demoSnapshot(now)
	} else {
		s = realSnapshot(now)
	}
	for i := range s.Clients.Clients {
		addr, _ := parseClient(s.Clients.Clients[i].Client)
		if until := demo.blocked[addr]; until.After(now) {
			s.Clients.Clients[i].BlockedUntil = &until
		}
	}
	return s
}

func (s *stats) common(now time.Time) {
	s.Version, s.Time, s.Started, s.Loaded = "(devel)", now, processStart, processStart
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		s.Version = info.Main.Version
	}
	s.Caddy, _ = caddy.Version()
	buckets := []float64{0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10}
	if s.DialSeconds.Buckets == nil {
		s.Refusals = map[string]int64{}
		s.DialSeconds = histogram{buckets, make([]int64, len(buckets)+1)}
		s.FirstByteSeconds = histogram{buckets, make([]int64, len(buckets)+1)}
	}
}

func realSnapshot(now time.Time) snapshot {
	s := snapshot{Refusals: []refusalInfo{}, Settings: []siteSettings{}}
	s.Stats.common(now)
	s.Clients.Clients, s.Tunnels.Tunnels = []clientInfo{}, []tunnelInfo{}
	limiters.Range(func(_, v any) bool {
		l := v.(*limiter)
		s.Stats.Clients.Limit = int64(l.key.maxClients)
		s.Stats.Clients.Tracked += int64(l.clients())
		l.gens.Load().cur.Range(func(addr netip.Addr, b *bucket) bool {
			missing := float64(max(0, b.full.Load()-sinceEpoch(now))) / float64(l.interval)
			name := clientName(addr)
			if addr.Is6() && l.key.v6 < 128 {
				name += "/" + strconv.Itoa(l.key.v6)
			}
			rejections := b.refused.Load()
			s.Stats.Requests.RateLimited += rejections
			s.Clients.Clients = append(s.Clients.Clients, clientInfo{
				Client: name, Zone: l.key.zone, Tokens: max(0, float64(l.key.burst)-missing), Burst: l.key.burst, Refill: l.key.refill,
				Requests: int64(missing), Rejections: rejections, LastSeen: now,
			})
			return true
		})
		return true
	})
	registries.Range(func(_, v any) bool {
		v.(*registry).tunnels.Range(func(id uint64, t *tunnel) bool {
			s.Tunnels.Tunnels = append(s.Tunnels.Tunnels, tunnelInfo{
				ID: id, Client: clientName(t.client), Target: t.target, Address: t.address.String(), Proto: t.proto,
				Started: t.start, IdleSeconds: float64(sinceEpoch(now)-t.active.Load()) / 1e9, BytesUp: t.up.Load(), BytesDown: t.down.Load(),
			})
			s.Stats.Tunnels.Open++
			return true
		})
		return true
	})
	return s
}

func demoSnapshot(now time.Time) snapshot {
	d := &demo
	size, _ := strconv.Atoi(cmp.Or(os.Getenv("ASYNC_PROXY_DEMO_CLIENTS"), "180"))
	if d.last.IsZero() {
		d.last = now.Add(-time.Second)
		d.stats.Clients.Limit, d.stats.Tunnels.Limit = 1_000_000, 5000
		for i := range size {
			name := fmt.Sprintf("203.0.%d.%d", 113+i/250, 1+i%250)
			if i%7 == 3 {
				name = fmt.Sprintf("2001:db8:%x:%x::/64", i/3, i*37%4096)
			}
			d.clients = append(d.clients, clientInfo{Client: name, Zone: "default", Tokens: 60, Burst: 60, Refill: 4, LastSeen: now.Add(-time.Duration(rand.ExpFloat64() * 2e10))})
		}
	}
	d.stats.common(now)
	targets := []string{"api.github.com:443", "registry.npmjs.org:443", "proxy.golang.org:443", "pypi.org:443", "deb.debian.org:443", "fonts.example.net:443", "cdn.example.com:443", "very-long-bucket-name-for-artefacts.s3.eu-central-1.example.com:443", "mail.example.org:993"}
	for steps := int(now.Sub(d.last) / (100 * time.Millisecond)); steps > 0; steps-- {
		d.last = d.last.Add(100 * time.Millisecond)
		t := float64(d.last.UnixMilli()) / 1000
		load := 18 + 9*math.Sin(t/40) + 4*math.Sin(t/7)
		burst := math.Mod(t, 90) < 14
		for i := range min(len(d.clients), 400) {
			c := &d.clients[i]
			c.Tokens = min(float64(c.Burst), c.Tokens+c.Refill/10)
		}
		for range int(load * (0.5 + rand.Float64())) {
			i := int(math.Abs(rand.NormFloat64()) * float64(min(size, 180)) / 4)
			if burst && rand.IntN(2) == 0 {
				i = 3 + rand.IntN(2)
			}
			if i >= len(d.clients) {
				continue
			}
			c := &d.clients[i]
			c.Requests++
			c.LastSeen = d.last
			if c.Tokens < 1 {
				c.Rejections++
				d.stats.Requests.RateLimited++
				demoRefuse(c, 429, "http_request_denied", "Too many requests from your address; try again in 1 s.", targets[rand.IntN(len(targets))])
				continue
			}
			c.Tokens--
			ms := math.Exp(rand.NormFloat64()*0.9 + 2.6)
			observe(&d.stats.DialSeconds, ms/1000)
			observe(&d.stats.FirstByteSeconds, ms*3.5/1000)
			up, down := int64(rand.ExpFloat64()*900), int64(rand.ExpFloat64()*42000)
			c.BytesUp += up
			c.BytesDown += down
			d.stats.BytesUp += up
			d.stats.BytesDown += down
			switch p := rand.Float64(); {
			case p < 0.02:
				d.stats.Requests.Refused++
				demoRefuse(c, 403, "destination_ip_prohibited", "This proxy does not connect to 10.0.0.7, which is a private address; its option allow opens it.", "intranet.corp:443")
			case p < 0.035:
				d.stats.Requests.Failed++
				d.stats.Dials.Failed++
				demoRefuse(c, 504, "connection_timeout", "There was no connection to slow.example.com in time.", "slow.example.com:443")
			case p < 0.3:
				d.stats.Dials.OK++
				d.stats.Requests.Tunnels++
				d.stats.Tunnels.Opened++
				d.id++
				tun := tunnelInfo{ID: d.id, Client: c.Client, Target: targets[rand.IntN(len(targets))], Address: "198.51.100.7:443", Proto: []string{"HTTP/1.1", "HTTP/2.0", "HTTP/2.0", "HTTP/3.0"}[rand.IntN(4)], Started: d.last}
				if i%5 == 0 {
					tun.User = "ci"
				}
				c.Tunnels++
				d.tunnels = append(d.tunnels, tun)
			default:
				d.stats.Requests.Forwarded++
			}
		}
		for i := range d.tunnels {
			tun := &d.tunnels[i]
			tun.IdleSeconds += 0.1
			if rand.IntN(12) == 0 {
				tun.IdleSeconds = 0
				up, down := int64(rand.ExpFloat64()*2000), int64(rand.ExpFloat64()*60000)
				tun.BytesUp += up
				tun.BytesDown += down
				d.stats.BytesUp += up
				d.stats.BytesDown += down
			}
		}
		d.tunnels = slices.DeleteFunc(d.tunnels, func(t tunnelInfo) bool { return rand.IntN(400) == 0 })
	}
	s := snapshot{Stats: d.stats, Refusals: slices.Clone(d.refusals)}
	s.Stats.Refusals = map[string]int64{"destination_ip_prohibited": d.stats.Requests.Refused, "connection_timeout": d.stats.Requests.Failed}
	s.Stats.Tunnels.Open = int64(len(d.tunnels))
	s.Stats.Clients.Tracked = int64(len(d.clients))
	s.Clients.Clients, s.Tunnels.Tunnels = slices.Clone(d.clients), slices.Clone(d.tunnels)
	slices.Reverse(s.Tunnels.Tunnels)
	s.Settings = []siteSettings{{":8080", []setting{
		{"burst", "60", false}, {"refill", "4", false}, {"ipv4_prefix", "32", true}, {"ipv6_prefix", "64", true}, {"max_clients", "1000000", true},
		{"zone", "default", true}, {"exempt", "none", true}, {"allow", "10.20.0.0/16 10.30.0.0/16", false}, {"dial_timeout", "10s", true}, {"response_header_timeout", "5m", true},
		{"via", "caddy-async-proxy", true}, {"forwarded_for", "off", false}, {"hosts", "none", true}, {"max_tunnels", "5000 per_client 200", false},
		{"tunnel_idle_timeout", "1h", true}, {"tunnel_max_duration", "none", true}, {"stream_close_delay", "never", true}, {"recheck_tunnels", "off", true},
	}}}
	return s
}

func observe(h *histogram, seconds float64) {
	i, _ := slices.BinarySearch(h.Buckets, seconds)
	h.Counts = slices.Clone(h.Counts)
	h.Counts[i]++
}

func demoRefuse(c *clientInfo, status int, reason, detail, target string) {
	demo.refusals = slices.Insert(demo.refusals, 0, refusalInfo{demo.last, c.Client, []string{"CONNECT", "GET"}[rand.IntN(2)], target, status, reason, detail})
	demo.refusals = demo.refusals[:min(100, len(demo.refusals))]
}
