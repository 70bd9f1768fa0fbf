//! A graph as ordinary `Vec`s, and the search of it on the CPU alone.

/// What stands for the level of a vertex that has none; `level.comp` has the same.
pub const UNREACHED: u32 = u32::MAX;

/// Which quarter of the matrix an edge falls into, in parts of 65536: Graph500's
/// 0.57, 0.19, 0.19 and the rest.
const FIRST: u16 = 37_356;
const SECOND: u16 = 49_807;
const THIRD: u16 = 62_259;

/// An undirected graph in compressed rows: the neighbours of vertex `v` are
/// `edges[offsets[v]..offsets[v + 1]]`.
#[derive(Debug)]
pub struct Graph {
    pub offsets: Vec<u64>,
    pub edges: Vec<u32>,
}

impl Graph {
    /// A Kronecker (RMAT) graph of 2^`scale` vertices, as Graph500 has it: few vertices
    /// have very many neighbours, and who is near in the graph is not so in memory. Each
    /// of `degree` edges a vertex is stored in both directions.
    pub fn kronecker(scale: u32, degree: u32) -> Self {
        let vertices = 1usize << scale;
        let mut random = Random(0x9E37_79B9_7F4A_7C15);
        let ends: Vec<[u32; 2]> = (0..vertices * degree as usize)
            .map(|_| random.edge(scale).map(|vertex| renamed(vertex, scale)))
            .collect();
        // First how many edges each vertex has, then where they begin; each edge that is
        // put in its place moves that on to the end.
        let mut offsets = vec![0u64; vertices + 1];
        for &vertex in ends.iter().flatten() {
            offsets[vertex as usize + 1] += 1;
        }
        for vertex in 0..vertices {
            offsets[vertex + 1] += offsets[vertex];
        }
        let mut next = offsets.clone();
        let mut edges = vec![0; 2 * ends.len()];
        for [a, b] in ends {
            for (from, to) in [(a, b), (b, a)] {
                edges[index(next[from as usize])] = to;
                next[from as usize] += 1;
            }
        }
        Self { offsets, edges }
    }

    pub fn vertices(&self) -> u32 {
        u32::try_from(self.offsets.len() - 1).expect("vertices have numbers of 32 bits")
    }

    pub fn neighbours(&self, vertex: u32) -> &[u32] {
        let vertex = vertex as usize;
        &self.edges[index(self.offsets[vertex])..index(self.offsets[vertex + 1])]
    }

    /// What the device follows pointers to: the graph, and a level for each vertex.
    pub fn bytes(&self) -> u64 {
        (size_of_val(&self.offsets[..]) + size_of_val(&self.edges[..])) as u64
            + 4 * u64::from(self.vertices())
    }

    /// Where to begin: that neighbour of the best connected vertex which itself has the
    /// fewest. So most of the graph is reached, and not at once.
    pub fn source(&self) -> u32 {
        let degree = |&vertex: &u32| self.neighbours(vertex).len();
        let hub = (0..self.vertices()).max_by_key(degree).unwrap_or(0);
        let farthest = self.neighbours(hub).iter().copied().min_by_key(degree);
        farthest.unwrap_or(hub)
    }

    /// The level of each vertex, as the CPU finds it.
    pub fn search(&self, source: u32) -> Vec<u32> {
        let mut levels = vec![UNREACHED; self.offsets.len() - 1];
        levels[source as usize] = 0;
        let mut frontier = vec![source];
        let mut level = 0;
        while !frontier.is_empty() {
            level += 1;
            let mut next = Vec::new();
            for vertex in frontier {
                for &neighbour in self.neighbours(vertex) {
                    if levels[neighbour as usize] == UNREACHED {
                        levels[neighbour as usize] = level;
                        next.push(neighbour);
                    }
                }
            }
            frontier = next;
        }
        levels
    }

    /// Changes when anything of the graph does.
    pub fn digest(&self) -> u64 {
        let edges = self.edges.iter().map(|&edge| u64::from(edge));
        let words = self.offsets.iter().copied().chain(edges);
        words.fold(0, |digest: u64, word| {
            (digest.rotate_left(5) ^ word).wrapping_mul(0x9E37_79B9_7F4A_7C15)
        })
    }
}

/// An offset, to index with.
fn index(offset: u64) -> usize {
    usize::try_from(offset).expect("an index of what is in memory")
}

/// Gives vertices other numbers, each its own: a number says nothing about how well
/// connected the vertex is.
fn renamed(vertex: u32, scale: u32) -> u32 {
    let mask = (1 << scale) - 1;
    let vertex = vertex.wrapping_mul(0x9E37_79B1) & mask;
    let vertex = vertex ^ vertex >> (scale / 2 + 1);
    vertex.wrapping_mul(0x85EB_CA6B) & mask
}

/// Random numbers, the same in each run (xorshift).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// The ends of an edge: `scale` times one of four quarters.
    fn edge(&mut self, scale: u32) -> [u32; 2] {
        let [mut row, mut column] = [0, 0];
        for bit in 0..scale {
            if bit % 4 == 0 {
                self.next();
            }
            // 16 other bits each time.
            let [low, high, ..] = (self.0 >> (bit % 4 * 16)).to_le_bytes();
            let part = u16::from_le_bytes([low, high]);
            let right = (part >= FIRST) ^ (part >= SECOND) ^ (part >= THIRD);
            row = row << 1 | u32::from(part >= SECOND);
            column = column << 1 | u32::from(right);
        }
        [row, column]
    }
}
