// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/asyncproxy/caddy-async-proxy/internal/printable"
	"github.com/asyncproxy/caddy-async-proxy/internal/status"
	"github.com/asyncproxy/caddy-async-proxy/internal/version"
)

// refreshInterval is the refresh interval of --watch.
const refreshInterval = 2 * time.Second

// defaultRows is how many clients and tunnels the command shows when the terminal's height
// is unknown.
const defaultRows = 10

// statusCommand returns `caddy async-proxy status`.
func statusCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status [--refusals] [--sort <order>] [--limit <n>] [--client <text>] [--watch] [--json] [--address <addr>]",
		Short: "Shows what a running proxy is doing",
		Long: `
Queries the admin endpoint of a running Caddy and prints current warnings,
counters and the most recently active clients and tunnels. With --watch it
repeats every two seconds and keeps trying while Caddy cannot be reached. On a
terminal it then redraws in place and shows as many rows as fit.

--sort puts the largest or latest first. Clients can be sorted by
` + status.ClientSorts + `, and tunnels
by ` + status.TunnelSorts + `. A list that cannot be sorted in that way
keeps its usual order.

With --refusals it prints, in place of clients and tunnels, the refusals by
cause, client, target and rule, with what would allow them, and the targets
with the most requests. Refusals can be sorted by ` + status.RefusalSorts + `, and
targets by ` + status.TargetSorts + `.
`,
		Args: cobra.NoArgs,
	}
	cmd.Flags().BoolP("watch", "w", false, "Repeat until interrupted")
	cmd.Flags().BoolP("refusals", "", false, "Show refusals and targets in place of clients and tunnels")
	cmd.Flags().BoolP("json", "j", false, "Print JSON; with --watch, one line per update")
	cmd.Flags().StringP("sort", "", "", "Sort by this, the largest or latest first")
	cmd.Flags().StringP("limit", "", "", fmt.Sprintf("Rows of each list, from 1 to %d (default %d, or more if they fit)", status.MaxPage, defaultRows))
	cmd.Flags().StringP("client", "", "", "Show only clients, and tunnels and refusals of clients, whose name contains this text")
	cmd.Flags().StringP("address", "", "", "Address of the admin endpoint, if it is not Caddy's default")
	cmd.RunE = caddycmd.WrapCommandFuncForCobra(runStatus)
	return cmd
}

// runStatus runs `caddy async-proxy status`.
func runStatus(flags caddycmd.Flags) (int, error) {
	address, err := adminAddress(flags.String("address"))
	if err != nil {
		return caddy.ExitCodeFailedQuit, err
	}
	query, err := statusQueryOf(flags)
	if err != nil {
		return caddy.ExitCodeFailedQuit, err
	}
	limit := query.limit
	watch, asJSON := flags.Bool("watch"), flags.Bool("json")
	stdout := int(os.Stdout.Fd())
	clear := watch && !asJSON && term.IsTerminal(stdout)
	for {
		width, height := 0, 0
		if clear {
			width, height, _ = term.GetSize(stdout) // 0 if unknown
		}
		query.limit = cmp.Or(limit, max(defaultRows, min(height, status.MaxPage)))
		shown, err := fetchStatus(address, query)
		if err != nil && !watch {
			return caddy.ExitCodeFailedQuit, err
		}
		var out bytes.Buffer
		switch {
		case err != nil && !clear:
			fmt.Fprintf(os.Stderr, "Error: %v\n", err)
		case err != nil:
			fmt.Fprintf(&out, "%s: cannot reach Caddy, retrying\n\n%s\n", time.Now().Format(time.TimeOnly), wrapText(err.Error(), width))
		case asJSON:
			_ = json.NewEncoder(&out).Encode(shown)
		default:
			shown.width = width
			if height > 0 {
				shown.fit(height)
			}
			shown.print(&out)
		}
		if clear {
			fmt.Print(screenUpdate(out.String(), width, height))
		} else {
			_, _ = out.WriteTo(os.Stdout)
		}
		if !watch {
			return caddy.ExitCodeSuccess, nil
		}
		time.Sleep(refreshInterval)
	}
}

// statusQueryOf returns what the flags ask for. Its limit is 0 if none is given.
func statusQueryOf(flags caddycmd.Flags) (statusQuery, error) {
	query := statusQuery{sort: flags.String("sort"), client: flags.String("client"), refusals: flags.Bool("refusals")}
	if query.refusals && flags.Changed("sort") {
		if err := checkRefusalSort(query.sort); err != nil {
			return query, err
		}
	} else if flags.Changed("sort") && !status.SortsClients(query.sort) && !status.SortsTunnels(query.sort) {
		return query, fmt.Errorf("sort %q: expected %s for clients, or %s for tunnels", query.sort, status.ClientSorts, status.TunnelSorts)
	}
	if flags.Changed("limit") {
		var ok bool
		if query.limit, ok = parseInt(flags.String("limit"), 1, status.MaxPage); !ok {
			return query, fmt.Errorf("limit %q: expected a number from 1 to %d", flags.String("limit"), status.MaxPage)
		}
	}
	return query, nil
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

// statusReport holds what the command prints.
type statusReport struct {
	Stats   status.Stats      `json:"stats"`
	Clients status.ClientList `json:"clients,omitzero"`
	Tunnels status.TunnelList `json:"tunnels,omitzero"`

	// With --refusals, in place of clients and tunnels.
	Refusals *status.RefusalList `json:"refusals,omitempty"`
	Targets  *status.TargetList  `json:"targets,omitempty"`

	width int // of the terminal; 0: unknown
}

// statusQuery selects the clients and tunnels that the command shows.
type statusQuery struct {
	sort, client string // "": the usual order, and all clients
	limit        int
	refusals     bool
}

// clients returns the query for the list of clients.
func (q statusQuery) clients() string {
	values := url.Values{"limit": {strconv.Itoa(q.limit)}, "q": {q.client}}
	if status.SortsClients(q.sort) {
		values.Set("sort", q.sort)
	}
	return values.Encode()
}

// tunnels returns the query for the list of tunnels. Those that were active last are first,
// if there is no other order.
func (q statusQuery) tunnels() string {
	values := url.Values{"limit": {strconv.Itoa(q.limit)}, "client": {q.client}, "sort": {"idle"}, "order": {"asc"}}
	if status.SortsTunnels(q.sort) {
		values.Set("sort", q.sort)
		values.Set("order", "desc")
	}
	return values.Encode()
}

func fetchStatus(address string, query statusQuery) (*statusReport, error) {
	s := new(statusReport)
	paths := map[string]any{"stats": &s.Stats, "clients?" + query.clients(): &s.Clients, "tunnels?" + query.tunnels(): &s.Tunnels}
	if query.refusals {
		paths = query.refusalPaths(s)
	}
	for path, into := range paths {
		if err := fetchAdmin(address, path, into); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// adminAddress returns the address of the admin endpoint: the one that --address gives, or Caddy's
// default.
func adminAddress(given string) (string, error) {
	if given != "" {
		if err := checkEndpoint("address", given); err != nil {
			return "", err
		}
	}
	return caddycmd.DetermineAdminAPIAddress(cmp.Or(given, defaultAdmin()), nil, "", "")
}

// fetchAdmin reads what the admin API has below /async_proxy/ at path.
func fetchAdmin(address, path string, into any) error {
	res, err := caddycmd.AdminAPIRequest(address, http.MethodGet, "/async_proxy/"+path, nil, nil)
	if err != nil {
		return queryError(address, err)
	}
	defer res.Body.Close()
	if err := json.NewDecoder(res.Body).Decode(into); err != nil {
		return fmt.Errorf("invalid response from %s: %w", address, err)
	}
	return nil
}

// queryError says why a query failed, and what to do about it. Caddy gives its reason as text only.
func queryError(address string, err error) error {
	text := err.Error()
	hint := "use --address for another admin endpoint"
	switch {
	case strings.Contains(text, "HTTP 400: "):
		var answer caddy.APIError
		_, body, _ := strings.Cut(text, "HTTP 400: ")
		if json.Unmarshal([]byte(body), &answer) == nil && answer.Message != "" {
			return errors.New(answer.Message)
		}
	case strings.Contains(text, "permission denied"):
		hint = "only root and the user that the proxy runs as may ask it"
	case strings.Contains(text, "connection refused"), strings.Contains(text, "no such file"):
		hint = "start the proxy, or " + hint
	}
	return fmt.Errorf("querying %s: %w; %s", address, err, hint)
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

func (s *statusReport) print(w io.Writer) {
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

	fmt.Fprintf(w, "\n")
	if s.Refusals != nil {
		s.printRefusals(w)
		return
	}
	table = tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	zone := columnIf(slices.ContainsFunc(s.Clients.Clients, func(c status.Client) bool { return c.Zone != s.Clients.Clients[0].Zone }))
	policy := columnIf(slices.ContainsFunc(s.Clients.Clients, func(c status.Client) bool { return c.Policy != "" }))
	fmt.Fprintf(table, "CLIENT%s%s\tTOKENS\tREQUESTS\tREJECTED\tTUNNELS\tUP\tDOWN\tSEEN\n", zone("ZONE"), policy("POLICY"))
	for _, c := range s.Clients.Clients {
		tokens := fmt.Sprintf("%.1f/%d", c.Tokens, c.Burst)
		if c.BlockedUntil != nil {
			tokens = "blocked " + formatAge(c.BlockedUntil.Sub(st.Time))
		}
		seen := "never"
		if !c.LastSeen.IsZero() {
			seen = formatAge(st.Time.Sub(c.LastSeen)) + " ago"
		}
		fmt.Fprintf(table, "%s%s%s\t%s\t%d\t%d\t%d\t%s\t%s\t%s\n", printable.Text(c.Client), zone(printable.Text(c.Zone)), policy(printable.Text(c.Policy)), tokens, c.Requests, c.Rejections, c.Tunnels,
			formatSize(c.BytesUp), formatSize(c.BytesDown), seen)
	}
	_ = table.Flush()
	printMore(w, s.Clients.Total-len(s.Clients.Clients), "clients")

	fmt.Fprintf(w, "\n")
	table = tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	policy = columnIf(slices.ContainsFunc(s.Tunnels.Tunnels, func(t status.Tunnel) bool { return t.Policy != "" }))
	fmt.Fprintf(table, "TUNNEL\tCLIENT%s\tTARGET\tPROTO\tAGE\tIDLE\tUP\tDOWN\n", policy("POLICY"))
	for _, t := range s.Tunnels.Tunnels {
		client := t.Client
		if t.User != "" {
			client = t.User + "@" + client
		}
		fmt.Fprintf(table, "%d\t%s%s\t%s\t%s\t%s\t%s\t%s\t%s\n", t.ID, printable.Text(client), policy(printable.Text(t.Policy)), printable.Text(t.Target), printable.Text(t.Proto), formatAge(st.Time.Sub(t.Started)),
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
