// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/caddyauth"
	"github.com/puzpuzpuz/xsync/v4"
)

// Comparing a password with a hash takes a processor about a second. These
// mechanisms keep that from stopping the proxy, and a client that guesses
// passwords, or a job that uses an old one, from locking out others behind the
// same address:
//
//   - loginGate bounds how many passwords are checked at once.
//   - credentialSet remembers the results. Credentials that were right before are
//     neither checked nor limited, and those that were wrong are not checked again.
//   - failedLogins is a bucket of failed logins for each client. A login for which
//     there is no token waits a while for one, so that somebody who knows the
//     password gets in beside somebody who guesses one password after the other.
//     Several guesses at a time may take all tokens of that while.

const (
	// loginPatience bounds how long a login waits for a token, and again how
	// long it waits for other passwords to be checked.
	loginPatience = 15 * time.Second

	// maxLoginLine bounds how many logins of one client wait at once.
	maxLoginLine = 100

	// loginRetry is when a client whose login was not checked may try again.
	loginRetry = 5 * time.Second

	// maxFailedLoginsPer keeps sums of times within an int64 of nanoseconds.
	maxFailedLogins    = 1_000_000
	maxFailedLoginsPer = caddy.Duration(365 * 24 * time.Hour)
)

var (
	errFailedLogins = errors.New("too many failed logins of the client")
	errLoginsBusy   = errors.New("too many passwords are waiting to be checked")
)

// loginGate lets one login of each client be checked at once, and a bounded
// number in all. The others wait.
type loginGate struct {
	slots    chan struct{}
	patience time.Duration

	mu    sync.Mutex
	lines map[netip.Addr]*loginLine
}

// loginLine is the logins of one client that are being checked, or wait.
type loginLine struct {
	turn chan struct{} // holds the one whose turn it is
	n    int
}

// logins is the gate of the process: half of the processors check passwords, the
// other half carries traffic.
var logins = newLoginGate(max(1, runtime.GOMAXPROCS(0)/2), loginPatience)

func newLoginGate(slots int, patience time.Duration) *loginGate {
	return &loginGate{slots: make(chan struct{}, slots), patience: patience, lines: make(map[netip.Addr]*loginLine)}
}

// enter waits for the client's turn, to be followed by leave if there is no
// error. It gives up with errLoginsBusy, or when ctx ends.
func (g *loginGate) enter(ctx context.Context, client netip.Addr) error {
	g.mu.Lock()
	line := g.lines[client]
	if line == nil {
		line = &loginLine{turn: make(chan struct{}, 1)}
		g.lines[client] = line
	}
	if line.n >= maxLoginLine {
		g.mu.Unlock()
		return errLoginsBusy
	}
	line.n++
	g.mu.Unlock()

	deadline := time.Now().Add(g.patience)
	err := acquire(ctx, line.turn, deadline)
	if err != nil {
		g.quit(client, line)
		return err
	}
	if err = acquire(ctx, g.slots, deadline); err != nil {
		<-line.turn
		g.quit(client, line)
	}
	return err
}

// leave ends what enter has begun.
func (g *loginGate) leave(client netip.Addr) {
	<-g.slots
	g.mu.Lock()
	line := g.lines[client]
	g.mu.Unlock()
	<-line.turn
	g.quit(client, line)
}

func (g *loginGate) quit(client netip.Addr, line *loginLine) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if line.n--; line.n == 0 {
		delete(g.lines, client)
	}
}

// acquire puts a token into a channel. The client's leaving is watched for only
// if that takes time.
func acquire(ctx context.Context, to chan struct{}, deadline time.Time) error {
	select {
	case to <- struct{}{}:
		return nil
	default:
	}
	timer := time.NewTimer(time.Until(deadline))
	defer timer.Stop()
	select {
	case to <- struct{}{}:
		return nil
	case <-timer.C:
		return errLoginsBusy
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// failedLogins holds the buckets of failed logins that are in use, by limiterKey.
// As with limiters, they survive a reload.
var failedLogins = caddy.NewUsagePool()

// provisionFailedLogins takes the handler's buckets of failed logins, to be given
// back by Cleanup.
func (h *Handler) provisionFailedLogins() error {
	switch {
	case h.FailedLogins < -1 || h.FailedLogins > maxFailedLogins:
		return fmt.Errorf("failed_logins %d: expected a number from 1 to %d, or -1 for no limit", h.FailedLogins, maxFailedLogins)
	case h.FailedLoginsPer < caddy.Duration(time.Second) || h.FailedLoginsPer > maxFailedLoginsPer:
		return fmt.Errorf("failed_logins_per %v: expected a duration from 1s to %v", time.Duration(h.FailedLoginsPer), time.Duration(maxFailedLoginsPer))
	case len(h.auth) == 0 || h.FailedLogins < 0:
		return nil
	}
	key := h.limiterKey()
	key.burst, key.refill = int64(h.FailedLogins), float64(h.FailedLogins)/time.Duration(h.FailedLoginsPer).Seconds()
	pooled, _, err := failedLogins.LoadOrNew(key, func() (caddy.Destructor, error) { return newLimiter(key), nil })
	if err == nil {
		h.failed = pooled.(*limiter)
	}
	return err
}

// repeatsOf is the key of the bucket for credentials of a client that are known
// to be wrong. Using them again is not a guess, so it takes no token of the
// bucket of failed logins, but it is limited as well.
func repeatsOf(client netip.Addr) netip.Addr {
	return netip.AddrFrom16(client.As16()).WithZone("repeats")
}

// reserve takes one of the client's tokens, which may be one that the bucket gains
// only after wait. If that would take longer than patience, it takes none, and
// wait is the time until there is one.
func (l *limiter) reserve(client netip.Addr, now int64, patience time.Duration) (wait time.Duration, ok bool) {
	full := &l.bucket(client, now).full
	for {
		was := full.Load()
		next := max(was, now) + l.interval
		over := time.Duration(max(0, next-now-l.fill))
		if over > patience {
			return over, false
		}
		if full.CompareAndSwap(was, next) {
			return over, true
		}
	}
}

// until returns how long it takes until the client has a token.
func (l *limiter) until(client netip.Addr, now int64) time.Duration {
	return time.Duration(max(0, max(l.bucket(client, now).full.Load(), now)+l.interval-now-l.fill))
}

// credentialKey stands for the credentials of a request, without giving them away.
type credentialKey [sha256.Size]byte

// credentialSecret makes keys useless to other processes.
var credentialSecret = func() (secret [32]byte) {
	_, _ = rand.Read(secret[:]) // never fails
	return secret
}()

// credentialSet is a bounded set. When it is half full, what was not looked up
// since it was half full before is forgotten. Its zero value is not usable.
type credentialSet struct {
	half int
	gens atomic.Pointer[[2]*xsync.Map[credentialKey, struct{}]] // newest first
}

// The credentials that providers have found right or wrong. For those of
// http_basic that is so forever, as their keys depend on the stored hash.
var rightCredentials, wrongCredentials = newCredentialSet(10_000), newCredentialSet(10_000)

func newCredentialSet(size int) *credentialSet {
	s := &credentialSet{half: size / 2}
	s.gens.Store(&[2]*xsync.Map[credentialKey, struct{}]{newCredentials(), newCredentials()})
	return s
}

func newCredentials() *xsync.Map[credentialKey, struct{}] {
	return xsync.NewMap[credentialKey, struct{}]()
}

func (s *credentialSet) has(key credentialKey) bool {
	g := s.gens.Load()
	if _, ok := g[0].Load(key); ok {
		return true
	}
	_, ok := g[1].Load(key)
	if ok {
		s.add(key)
	}
	return ok
}

func (s *credentialSet) add(key credentialKey) {
	g := s.gens.Load()
	if g[0].Size() >= s.half {
		s.gens.CompareAndSwap(g, &[2]*xsync.Map[credentialKey, struct{}]{newCredentials(), g[0]})
		g = s.gens.Load()
	}
	g[0].Store(key, struct{}{})
}

func (s *credentialSet) remove(key credentialKey) {
	for _, m := range s.gens.Load() {
		m.Delete(key)
	}
}

// basicLogin is what http_basic makes of credentials.
type basicLogin struct {
	user     string
	password string
	ok       bool // it can be read
}

// readBasic reads credentials as net/http's Request.BasicAuth does.
func readBasic(credentials string) basicLogin {
	const scheme = "Basic "
	if len(credentials) < len(scheme) || !strings.EqualFold(credentials[:len(scheme)], scheme) {
		return basicLogin{}
	}
	decoded, err := base64.StdEncoding.DecodeString(credentials[len(scheme):])
	if err != nil {
		return basicLogin{}
	}
	user, password, ok := strings.Cut(string(decoded), ":")
	return basicLogin{user, password, ok}
}

// basicKey depends on the hash that the account has now: a result that was true
// for it once stays true.
func basicKey(provider *caddyauth.HTTPBasicAuth, login basicLogin) credentialKey {
	return credentialsKey("http_basic", string(provider.HashRaw), provider.Accounts[login.user].Password, login.user, login.password)
}

// credentialsKey makes a key of parts, each with its length.
func credentialsKey(parts ...string) credentialKey {
	buf := append(make([]byte, 0, 512), credentialSecret[:]...)
	for _, part := range parts {
		buf = binary.AppendUvarint(buf, uint64(len(part)))
		buf = append(buf, part...)
	}
	return sha256.Sum256(buf)
}

// sleep waits, or returns the cause of ctx's end.
func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
