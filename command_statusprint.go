// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/printable"
	"github.com/asyncproxy/caddy-async-proxy/internal/status"
	"github.com/asyncproxy/caddy-async-proxy/internal/version"
)

// print prints the report.
func (s *statusReport) print(w io.Writer) {
	s.printStats(w)
	fmt.Fprintf(w, "\n")
	if s.Refusals != nil {
		s.printRefusals(w)
		return
	}
	s.printClients(w)
	fmt.Fprintf(w, "\n")
	s.printTunnels(w)
}

// printStats prints the versions, the warnings and the counters.
func (s *statusReport) printStats(w io.Writer) {
	st := &s.Stats
	fmt.Fprintf(w, "async_proxy %s in Caddy %s, up %s, config loaded %s ago\n\n", version.Build{Version: st.Version, Commit: st.Commit, Go: st.Go}, st.Caddy,
		formatAge(st.Time.Sub(st.Started)), formatAge(st.Time.Sub(st.Loaded)))
	for _, line := range s.warningLines(s.width) {
		fmt.Fprintln(w, line)
	}
	table := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintf(table, "requests\t%d forwarded\t%d tunnels\t%d passed on\n", st.Requests.Forwarded, st.Requests.Tunnels, st.Requests.PassedOn)
	fmt.Fprintf(table, "refused\t%d rate limited\t%d refused\t%d failed\n", st.Requests.RateLimited, st.Requests.Refused, st.Requests.Failed)
	fmt.Fprintf(table, "tunnels\t%s open\t%s up\t%s down\n", formatOfLimit(st.Tunnels.Open, st.Tunnels.Limit), formatSize(st.Tunnels.BytesUp), formatSize(st.Tunnels.BytesDown))
	fmt.Fprintf(table, "traffic\t%s in all\t%s up\t%s down\n", formatSize(st.BytesUp+st.BytesDown), formatSize(st.BytesUp), formatSize(st.BytesDown))
	fmt.Fprintf(table, "clients\t%s tracked\t%d evicted\t\n", formatOfLimit(st.Clients.Tracked, st.Clients.Limit), st.Clients.Evicted)
	_ = table.Flush()
}

// printClients prints the list of clients.
func (s *statusReport) printClients(w io.Writer) {
	table := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	zone := columnIf(slices.ContainsFunc(s.Clients.Clients, func(c status.Client) bool { return c.Zone != s.Clients.Clients[0].Zone }))
	policy := columnIf(slices.ContainsFunc(s.Clients.Clients, func(c status.Client) bool { return c.Policy != "" }))
	fmt.Fprintf(table, "CLIENT%s%s\tTOKENS\tREQUESTS\tREJECTED\tTUNNELS\tUP\tDOWN\tSEEN\n", zone("ZONE"), policy("POLICY"))
	for _, c := range s.Clients.Clients {
		tokens := fmt.Sprintf("%.1f/%d", c.Tokens, c.Burst)
		if c.BlockedUntil != nil {
			tokens = "blocked " + formatAge(c.BlockedUntil.Sub(s.Stats.Time))
		}
		seen := "never"
		if !c.LastSeen.IsZero() {
			seen = formatAge(s.Stats.Time.Sub(c.LastSeen)) + " ago"
		}
		fmt.Fprintf(table, "%s%s%s\t%s\t%d\t%d\t%d\t%s\t%s\t%s\n", printable.Text(c.Client), zone(printable.Text(c.Zone)), policy(printable.Text(c.Policy)), tokens, c.Requests, c.Rejections, c.Tunnels,
			formatSize(c.BytesUp), formatSize(c.BytesDown), seen)
	}
	_ = table.Flush()
	printMore(w, s.Clients.Total-len(s.Clients.Clients), "clients")
}

// printTunnels prints the list of tunnels.
func (s *statusReport) printTunnels(w io.Writer) {
	table := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	policy := columnIf(slices.ContainsFunc(s.Tunnels.Tunnels, func(t status.Tunnel) bool { return t.Policy != "" }))
	fmt.Fprintf(table, "TUNNEL\tCLIENT%s\tTARGET\tPROTO\tAGE\tIDLE\tUP\tDOWN\n", policy("POLICY"))
	for _, t := range s.Tunnels.Tunnels {
		client := t.Client
		if t.User != "" {
			client = t.User + "@" + client
		}
		fmt.Fprintf(table, "%d\t%s%s\t%s\t%s\t%s\t%s\t%s\t%s\n", t.ID, printable.Text(client), policy(printable.Text(t.Policy)), printable.Text(t.Target), printable.Text(t.Proto), formatAge(s.Stats.Time.Sub(t.Started)),
			formatAge(time.Duration(t.IdleSeconds*float64(time.Second))), formatSize(t.BytesUp), formatSize(t.BytesDown))
	}
	_ = table.Flush()
	printMore(w, s.Tunnels.Total-len(s.Tunnels.Tunnels), "tunnels")
}

// columnIf returns a function that makes a cell of a column, or nothing if the table does not have
// that column.
func columnIf(shown bool) func(cell string) string {
	return func(cell string) string {
		if !shown {
			return ""
		}
		return "\t" + cell
	}
}

func printMore(w io.Writer, n int, noun string) {
	if n == 1 {
		noun = strings.TrimSuffix(noun, "s")
	}
	if n > 0 {
		fmt.Fprintf(w, "and %d more %s\n", n, noun)
	}
}

func formatOfLimit(n, limit int64) string {
	if limit == 0 {
		return fmt.Sprint(n)
	}
	return fmt.Sprintf("%d of %d", n, limit)
}

// formatAge formats a duration in one or two units.
func formatAge(d time.Duration) string {
	switch d = max(0, d); {
	case d < 10*time.Second:
		return d.Round(100 * time.Millisecond).String()
	case d < time.Hour:
		return shortDuration(d.Round(time.Second))
	case d < 48*time.Hour:
		return shortDuration(d.Round(time.Minute))
	}
	return fmt.Sprintf("%dd", d/(24*time.Hour))
}

// formatSize formats a number of bytes with a unit.
func formatSize(n int64) string {
	const units = "kMGTPE"
	if n < 1000 {
		return fmt.Sprintf("%d B", n)
	}
	value, unit := float64(n)/1000, 0
	for ; value >= 999.5 && unit < len(units)-1; unit++ {
		value /= 1000
	}
	if value < 9.95 {
		return fmt.Sprintf("%.1f %cB", value, units[unit])
	}
	return fmt.Sprintf("%.0f %cB", value, units[unit])
}

// maxOtherLines is the maximum number of lines that print writes besides warnings and rows of
// the two lists.
const maxOtherLines = 13

// fit truncates the clients and tunnels to what fits a screen of the given height. Each
// list gets half of the room, plus what the other list does not need.
func (s *statusReport) fit(height int) {
	room := max(0, height-1-maxOtherLines-len(s.warningLines(s.width)))
	if s.Refusals != nil {
		s.fitRefusals(room)
		return
	}
	clients, tunnels := len(s.Clients.Clients), len(s.Tunnels.Tunnels)
	s.Clients.Clients = s.Clients.Clients[:min(clients, max(room-room/2, room-tunnels))]
	s.Tunnels.Tunnels = s.Tunnels.Tunnels[:min(tunnels, max(room/2, room-clients))]
}

// screenUpdate returns the terminal output that replaces the previous text with text, on a
// terminal of the given size. It clears only the remainder of each line after writing it,
// so that nothing flickers. It cuts off what does not fit, so that the top does not scroll
// away.
func screenUpdate(text string, width, height int) string {
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	if height > 1 && len(lines) >= height {
		lines = lines[:height-1]
	}
	var b strings.Builder
	b.WriteString("\x1b[H")
	for _, line := range lines {
		if runes := []rune(line); width > 1 && len(runes) >= width {
			line = string(runes[:width-2]) + "…"
		}
		b.WriteString(line + "\x1b[K\n")
	}
	return b.String() + "\x1b[J"
}

// wrapText breaks text into lines that fit a terminal of the given width.
func wrapText(text string, width int) string {
	if width < 2 {
		return text
	}
	var lines []string
	for line := range slices.Chunk([]rune(text), width-1) {
		lines = append(lines, string(line))
	}
	return strings.Join(lines, "\n")
}
