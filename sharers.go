// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"
)

// sharer is another process that gets connections which are meant for this one, because it listens
// at an address of this one, or at a more specific one on the same port.
type sharer struct {
	at   netip.AddrPort // where the other process listens
	name string         // of its program, printable; "": unknown
	pid  int            // 0: unknown
}

func (s sharer) String() string {
	if s.pid == 0 {
		return "unknown"
	}
	return fmt.Sprintf("%s, pid %d", s.name, s.pid)
}

// currentSharers returns the other processes that share addresses with this one, as they were at
// most sharerInterval ago. It costs no system call. It returns nil on systems that do not tell.
func currentSharers() []sharer {
	p := currentProcess()
	if p == nil {
		return nil
	}
	p.sharers.mu.Lock()
	defer p.sharers.mu.Unlock()
	return slices.Clone(p.sharers.known)
}

// ownConflicts returns the addresses at which two listeners of this process get connections by chance, as
// currentSharers does.
func ownConflicts() []netip.AddrPort {
	p := currentProcess()
	if p == nil {
		return nil
	}
	p.sharers.mu.Lock()
	defer p.sharers.mu.Unlock()
	return slices.Clone(p.sharers.conflicts)
}

// sharerInterval is how often a process looks for others that share its addresses. The other one
// may be started later, or end.
const sharerInterval = 10 * time.Second

// reloadPatience is how long the sockets of an old config may stay open beside those of the new one.
const reloadPatience = 2 * time.Second

// sharerWatch looks for sharers while a config with a proxy runs. The zero value is ready for use.
type sharerWatch struct {
	mu     sync.Mutex
	config any          // identifies the config that started last
	logger *zap.Logger  // of a proxy of that config
	search sharerSearch // what is known of the system
	known  []sharer     // found by the last check
	timer  *time.Timer  // for the next check; nil before the first one
	ended  bool         // there will be no other check

	twice     []netip.AddrPort // where this process had two sockets at the last check
	conflicts []netip.AddrPort // where it had two at the last two checks, so that no reload explains them
}

// started checks when a config has started. All proxies of a config call it.
func (w *sharerWatch) started(config any, logger *zap.Logger) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.config == config || w.ended {
		return
	}
	w.config, w.logger, w.known, w.twice, w.conflicts = config, logger, nil, nil, nil // so that each config warns
	w.search.reset()
	w.check()
}

// check logs what has changed since the last check, and schedules the next one.
func (w *sharerWatch) check() {
	found := w.search.find()
	byAddress := make(map[netip.AddrPort][]string)
	for _, s := range found {
		if !slices.Contains(w.known, s) {
			byAddress[s.at] = append(byAddress[s.at], s.String())
		}
	}
	for address, processes := range byAddress {
		w.logger.Warn("another process listens at the same address and gets some of the connections; stop it, or use another port",
			zap.Stringer("address", address), zap.Strings("processes", processes))
	}
	for _, s := range w.known {
		if !slices.Contains(found, s) {
			w.logger.Info("the other process at this address no longer listens", zap.Stringer("address", s.at), zap.Stringer("process", s))
		}
	}
	w.known = found
	next := sharerInterval
	if w.checkOwn(); len(w.twice) > len(w.conflicts) {
		next = reloadPatience
	}
	if w.timer == nil {
		w.timer = time.AfterFunc(next, w.onTimer)
	} else {
		w.timer.Reset(next)
	}
}

// checkOwn logs where two listeners of this process share an address. Caddy notices that only if both name
// the address alike, and not if one is localhost and the other 127.0.0.1.
func (w *sharerWatch) checkOwn() {
	twice := w.search.twice()
	conflicts := slices.DeleteFunc(slices.Clone(twice), func(at netip.AddrPort) bool { return !slices.Contains(w.twice, at) })
	for _, at := range conflicts {
		if !slices.Contains(w.conflicts, at) {
			w.logger.Warn(ownConflict, zap.Stringer("address", at))
		}
	}
	w.twice, w.conflicts = twice, conflicts
}

const ownConflict = "two listeners of this process, such as a site and the admin endpoint, share an address, and each gets some of the connections; give them different ports"

func (w *sharerWatch) onTimer() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.ended {
		w.check()
	}
}

// stop ends the checks.
func (w *sharerWatch) stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ended = true; w.timer != nil {
		w.timer.Stop()
	}
}
